"""Prefetch over a fake executor: order, bounds, evictions, cancellations."""

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from slora_jax.memory import CostAware, Immediate, Lru, PageKind, RestoreCosts
from slora_jax.scheduling import (
    AdapterState,
    Ageing,
    Clustering,
    EarlyAbort,
    Fcfs,
    FinishReason,
    Lcfs,
    Status,
    Vtc,
)

POLICIES = {
    "fcfs": Fcfs,
    "lcfs": Lcfs,
    "vtc": Vtc,
    "soft clustering": lambda: Clustering(3),
    "hard clustering": lambda: Clustering(3, hard=True),
    "early abort": lambda: EarlyAbort(slo=1e6),
    "ageing": lambda: Ageing(Lcfs(), bound=40.0),
}
EVICTIONS = {
    "lru": Lru,
    "immediate": Immediate,
    "cost-aware": lambda: CostAware(RestoreCosts(load=1e-4, reload_page=1e-4, recompute_page=1e-3)),
}


def prefetched(sim) -> list[str]:
    """Returns the digests in the pool that no request has used yet, in the order of prefetch."""
    return [r.digest for r in sim.residency.residents if not r.uses]


def busy(sim, new: int = 200) -> None:
    """Fills the batch with requests for the base model."""
    for _ in range(sim.scheduler.config.max_num_seqs):
        sim.add(2, new)
    sim.step()


@pytest.mark.parametrize(
    ("policy", "expected"),
    [
        ("fcfs", ["a", "b", "c"]),
        ("lcfs", ["f", "e", "d"]),
        ("vtc", ["a", "d", "f"]),  # tenants x, y and z in turn: prompts are charged
        ("soft clustering", ["a", "b", "c"]),
        ("hard clustering", ["a", "b", "c"]),
        ("ageing", ["a", "b", "f"]),  # two have aged, then the newest
    ],
)
def test_prefetch_follows_the_policys_order(simulate, policy, expected) -> None:
    sim = simulate(300, max_num_seqs=2, max_num_batched_tokens=16, policy=POLICIES[policy](), prefetch=3)
    busy(sim)
    for number, (adapter, tenant) in enumerate(zip("abcdef", "xxxyyz", strict=True)):
        if number == 2:
            sim.steps = 60  # so that the first two are old
        sim.add(4, 2, adapter, 2, tenant=tenant)
        if policy == "ageing" and number == 1:
            sim.requests[-1].metrics.arrival = sim.requests[-2].metrics.arrival = 0.0
    sim.step()
    assert prefetched(sim) == expected


def test_prefetch_includes_adapters_that_the_policy_holds_back(simulate) -> None:
    """Hard clustering admits only adapters of the batch; the next one is prefetched all the same."""
    sim = simulate(300, max_num_seqs=4, max_num_batched_tokens=16, policy=Clustering(1, hard=True), prefetch=2)
    sim.add(4, 30, "a", 2)
    while not sim.scheduler.running:
        sim.step()
    for adapter in "bac":
        sim.add(4, 2, adapter, 2)
    sim.step()
    assert prefetched(sim) == ["b", "c"]


def test_uploaded_pages_are_bounded_and_in_order_of_the_queue(simulate) -> None:
    sim = simulate(400, max_num_seqs=1, max_num_batched_tokens=16, prefetch=4, upload_pages_per_step=8, copy_steps=3)
    busy(sim)
    sizes = {"a": 13, "b": 20, "c": 1, "d": 5}
    for adapter, pages in sizes.items():
        sim.add(4, 2, adapter, pages)
    copied: list[tuple[str, int]] = []
    for _ in range(40):
        plan = sim.step()
        assert sum(upload.count for upload in plan.uploads) <= 8
        assert sim.pages_in_flight <= 16
        copied += [(u.resident.digest, page) for u in plan.uploads for page in range(u.first, u.first + u.count)]
    assert copied == [(adapter, page) for adapter, pages in sizes.items() for page in range(pages)]
    assert not sim.residency.arriving and sim.pages_in_flight == 0


@pytest.mark.parametrize("copy_steps", [1, 2, 7])
def test_request_starts_in_the_first_step_after_its_adapter_landed(simulate, copy_steps) -> None:
    """Requests with a ready adapter overtake it; requests behind it whose adapters are not ready do not."""
    sim = simulate(100, max_num_seqs=3, max_num_batched_tokens=64, prefetch=4, copy_steps=copy_steps)
    first = sim.add(2, 100)
    sim.step()
    late = sim.add(4, 3, "a", 5)
    other = sim.add(4, 100)
    sim.step()
    assert other.status is Status.RUNNING and late.status is Status.WAITING
    behind = [sim.add(4, 3, name, 2) for name in "bc"]
    steps = 1
    while late.status is Status.WAITING:
        assert all(request.status is Status.WAITING for request in behind)  # one slot is left
        sim.step()
        steps += 1
    assert steps == copy_steps + 1
    assert first.status is other.status is Status.RUNNING


def test_prefetched_adapters_are_ready_when_a_slot_becomes_free(simulate) -> None:
    """After the first, no request waits for a copy and the batch stays full."""
    sim = simulate(200, max_num_seqs=2, max_num_batched_tokens=32, prefetch=4, copy_steps=3)
    for number in range(12):
        sim.add(4, 20, f"a{number}", 3)
    plans = sim.run(300)
    assert sim.counters.prefetch_hits >= 10
    full = [len(plan.sequences) for plan in plans[3:-22]]
    assert np.mean(full) > 1.8, full  # the end of a sequence is read a step late
    sim.assert_idle()


def test_idle_step_waits_for_the_copy(simulate) -> None:
    sim = simulate(40, max_num_seqs=2, max_num_batched_tokens=32, prefetch=4, copy_steps=50)
    sim.add(4, 2, "a", 20)
    steps = len(sim.run(10))
    assert steps < 10 and len(sim.requests[0].output) == 2


def test_prefetch_leaves_room_for_running_requests_and_the_next_one(simulate) -> None:
    """Six running requests hold 3 of 39 pages each. One page for each and 5 for the next prompt stay free."""
    sim = simulate(39, max_num_seqs=6, max_num_batched_tokens=100, prefetch=8)
    for _ in range(6):
        sim.add(12, 50)
    sim.step()
    sim.add(20, 4, "a", 4)
    for adapter in "bcd":
        sim.add(1, 4, adapter, 3)
    for _ in range(3):
        sim.step()
    free = sim.allocator.num_free
    assert "a" in prefetched(sim)
    assert 5 <= free < 5 + 6 + 3 + 4


def test_prefetch_evicts_idle_adapters_that_no_near_request_awaits(simulate) -> None:
    sim = simulate(60, max_num_seqs=2, max_num_batched_tokens=32, prefetch=4)
    for name in ("old", "wanted", "older"):
        sim.add(2, 1, name, 15)
        sim.run(30)
    assert {r.digest for r in sim.residency.residents} == {"old", "wanted", "older"}
    busy(sim)
    sim.add(2, 2, "new", 14)
    sim.add(2, 2, "wanted", 15)
    sim.step()
    assert {r.digest for r in sim.residency.residents} >= {"new", "wanted"}
    assert "old" not in sim.residency


def test_prefetched_adapters_stay_when_newer_requests_come_first(simulate) -> None:
    sim = simulate(60, max_num_seqs=1, max_num_batched_tokens=32, policy=Lcfs(), prefetch=2)
    busy(sim, new=100)
    for name in ("a", "b"):
        sim.add(2, 2, name, 10)
    sim.step()
    assert sorted(prefetched(sim)) == ["a", "b"]
    for number in range(30):
        sim.add(2, 2, f"n{number}", 10)
        sim.step()
    assert sorted(prefetched(sim)) == ["a", "b"] and sim.counters.prefetches_wasted == 0


@pytest.mark.parametrize("name", EVICTIONS)
@pytest.mark.parametrize("steps", [1, 2, 30])
def test_cancelling_drops_an_adapter_in_flight(simulate, name, steps) -> None:
    """An adapter that has landed is an ordinary idle one: it stays, except under immediate eviction."""
    sim = simulate(
        200,
        max_num_seqs=1,
        max_num_batched_tokens=32,
        prefetch=2,
        upload_pages_per_step=4,
        copy_steps=2,
        eviction=EVICTIONS[name](),
    )
    busy(sim)
    request = sim.add(2, 2, "a", 12)
    for _ in range(steps):
        sim.step()
    landed = sim.residency.find("a").has_landed
    assert landed == (steps == 30)
    sim.core.finish(request, FinishReason.CANCELLED)
    for _ in range(5):
        sim.step()
    assert ("a" in sim.residency) == (landed and name != "immediate")
    assert sim.counters.prefetches_wasted == 1 and not sim.residency.arriving and not sim.pages_in_flight
    again = sim.add(2, 2, "a", 12)
    sim.run(400)
    assert len(again.output) == 2
    sim.assert_idle()


def test_adapter_in_flight_is_dropped_before_a_sequence_is_preempted(simulate) -> None:
    """While it is uploaded again, no request overtakes the one that waits for it."""
    sim = simulate(24, max_num_seqs=3, max_num_batched_tokens=32, prefetch=2, upload_pages_per_step=2, copy_steps=100)
    first = sim.add(4, 50)  # 1 page now, 14 at its end
    sim.step()
    waiting = sim.add(4, 30, "a", 12)
    while not sim.counters.prefetches_wasted:
        assert first.status is Status.RUNNING
        sim.step()
    assert sim.counters.preemptions == 0 and not sim.residency.arriving
    behind = sim.add(1, 2)
    while waiting.status is Status.WAITING:
        assert behind.status is Status.WAITING
        sim.step()
    sim.run(100)
    assert len(first.output) == 50 and len(waiting.output) == 30 and sim.counters.adapter_loads == 2
    sim.assert_idle()


def test_immediate_eviction_keeps_awaited_adapters(simulate) -> None:
    """S-LoRA's code evicts every unused adapter except those marked for prefetch."""
    sim = simulate(100, max_num_seqs=1, max_num_batched_tokens=32, prefetch=2, eviction=Immediate())
    sim.add(2, 6, "a", 3)
    sim.add(2, 6, "b", 3)
    sim.add(2, 6, "a", 3)
    loads = 0
    while sim.scheduler.has_work():
        sim.step()
        loads = sim.counters.adapter_loads
    sim.step()
    assert loads == 2  # "a" stayed while the third waited for it
    assert not sim.residency.residents and sim.counters.prefetches_wasted == 0


def test_reads_from_disk_are_prefetched_in_order(simulate) -> None:
    asked: list[str] = []

    def adapter_state(digest):
        asked.append(digest)
        return AdapterState.LOADING

    sim = simulate(200, max_num_seqs=1, max_num_batched_tokens=32, prefetch=3, adapter_state=adapter_state)
    busy(sim)
    for name in "abcdef":
        sim.add(2, 2, name, 2)
    sim.step()
    assert asked == ["a", "b", "c"]
    sim.step()
    assert asked == ["a", "b", "c"] * 2


@pytest.mark.parametrize("policy", [name for name in POLICIES if name != "early abort"])
def test_overload_does_not_thrash(simulate, policy) -> None:
    """Requests for 40 adapters of 1 to 9 pages arrive three times as fast as they are served: few uploads are wasted,
    and there are about as many as without prefetch."""
    loads = {}
    for prefetch in (0, 8):
        sim = simulate(120, 8, 32, policy=POLICIES[policy](), prefetch=prefetch, copy_steps=2)
        generator = np.random.default_rng(7)
        left = 250
        while left or sim.scheduler.has_work():
            for _ in range(min(left, generator.poisson(1.5))):
                left -= 1
                adapter = int(generator.integers(40))
                sim.add(*generator.integers((2, 4), (20, 24)).tolist(), f"a{adapter}", 1 + adapter % 9)
            sim.step()
            assert sim.steps < 5000
        loads[prefetch] = sim.counters.adapter_loads
        sim.step()
        sim.assert_idle()
    print(loads, sim.counters)
    newest_first = policy in ("lcfs", "ageing")  # each arrival is next in the queue, and so is its adapter
    assert sim.counters.prefetches_wasted <= (0.1 if newest_first else 0.03) * loads[8]
    assert loads[8] <= 1.1 * loads[0]


def test_without_prefetch_adapters_are_loaded_on_admission(simulate) -> None:
    sim = simulate(100, max_num_seqs=2, max_num_batched_tokens=32)
    for name in "abc":
        sim.add(4, 3, name, 4)
    plans = sim.run(30)
    assert [r.digest for r in plans[0].loads] == ["a", "b"]
    assert not any(plan.uploads for plan in plans)
    counters = sim.counters
    assert (counters.adapter_loads, counters.prefetch_hits, counters.prefetches_wasted) == (3, 0, 0)


REQUEST = st.fixed_dictionaries(
    {
        "prompt": st.integers(1, 30),
        "new": st.integers(1, 25),
        "adapter": st.sampled_from([None, *"abcdefgh"]),
        "early": st.integers(0, 25),  # output tokens up to a stop token, if less than `new`
        "gap": st.integers(0, 5),  # steps until the next request
    }
)


@given(
    requests=st.lists(REQUEST, min_size=1, max_size=20),
    spare_pages=st.integers(0, 40),
    max_num_seqs=st.integers(1, 6),
    budget=st.integers(0, 20),
    slots=st.integers(1, 6),
    prefetch=st.integers(0, 5),
    upload_pages_per_step=st.integers(1, 6),
    copy_steps=st.integers(0, 6),
    policy=st.sampled_from(sorted(POLICIES)),
    eviction=st.sampled_from(sorted(EVICTIONS)),
    admission=st.sampled_from(["optimistic", "reserve"]),
    split=st.booleans(),
    slow=st.sets(st.sampled_from("abcdefgh")),
    cancellations=st.dictionaries(st.integers(0, 60), st.integers(0, 19), max_size=5),
)
def test_random_traffic_ends_and_leaks_nothing(
    simulate, requests, spare_pages, max_num_seqs, budget, slots, prefetch, upload_pages_per_step, copy_steps, policy,
    eviction, admission, split, slow, cancellations,
) -> None:  # fmt: skip
    """Arrivals over time, cancellations, early stops and slow disks: every request gets its tokens, the bounds hold at
    every step, and first come, first served never preempts the oldest request."""
    pages_of = {None: 0} | {name: 1 + 2 * i for i, name in enumerate("abcdefgh")}
    kv = max(-(-(request["prompt"] + request["new"]) // 4) for request in requests)
    adapter = max(pages_of[request["adapter"]] for request in requests)
    asked = {name: itertools.count() for name in pages_of}

    def adapter_state(digest):
        slowly = digest in slow and next(asked[digest]) % 5 < 4
        return AdapterState.LOADING if slowly else AdapterState.READY

    sim = simulate(
        kv + adapter + spare_pages, max_num_seqs, max_num_seqs + budget, slots, POLICIES[policy](), adapter_state,
        admission, adapter + spare_pages // 2 if split and adapter + spare_pages // 2 else None,
        EVICTIONS[eviction](), prefetch, upload_pages_per_step, copy_steps,
    )  # fmt: skip
    left, pause, step = list(requests), 0, 0
    while left or sim.scheduler.has_work():
        while left and pause <= 0:
            one = left.pop(0)
            request = sim.add(one["prompt"], one["new"], one["adapter"], pages_of[one["adapter"]])
            if 0 < one["early"] < one["new"]:
                sim.stop_early[request.number] = one["early"]
            pause = one["gap"]
        pause -= 1
        if step in cancellations and cancellations[step] < len(sim.requests):
            sim.core.finish(sim.requests[cancellations[step]], FinishReason.CANCELLED)
        oldest = sim.scheduler.running[0] if sim.scheduler.running and policy == "fcfs" else None
        plan = sim.step()
        assert oldest is None or oldest.status is not Status.WAITING, "the oldest request was preempted"
        assert plan.num_tokens == sum(s.count for s in plan.sequences) <= max_num_seqs + budget
        assert len({s.request.number for s in plan.sequences}) == len(plan.sequences) <= max_num_seqs
        assert all(s.count >= 1 for s in plan.sequences)
        for sequence in plan.sequences:
            digest = sequence.request.digest
            if sequence.request.status is Status.RUNNING and digest is not None:
                assert sim.residency.find(digest).has_landed, "a sequence runs before its adapter has landed"
        residency = sim.residency
        assert residency.num_unused <= prefetch + max_num_seqs
        assert 0 <= sim.pages_in_flight <= 2 * upload_pages_per_step
        idle = [r for r in residency.residents if r.digest not in residency.users]
        assert sim.scheduler.evictor.pages(PageKind.ADAPTER) == sum(r.num_pages for r in idle)
        assert all(r.idle and (r.awaited or r.has_landed) for r in idle)
        step += 1
        assert step < 4000, "the scheduler makes no progress"
    for _ in range(copy_steps + 2):
        sim.step()
    for request in sim.requests:
        if request.finish_reason in (FinishReason.STOP, FinishReason.LENGTH):
            assert len(request.output) == sim.stop_early.get(request.number, request.max_new)
        else:
            assert request.finish_reason is FinishReason.CANCELLED
    assert not sim.copies and not sim.residency.arriving and not sim.residency.num_unused
    sim.assert_idle()
