"""The continuous-batching scheduler over a fake executor."""

from collections.abc import Sequence

import pytest

from slora_jax.errors import PoolError
from slora_jax.memory import PageKind
from slora_jax.scheduling import AdapterState, FinishReason, Lcfs, Request, Status, StepPlan
from slora_jax.scheduling.scheduler import MOST_PASSED_OVER


def counts(plan: StepPlan) -> dict[int, int]:
    """Request number -> tokens in this step."""
    return {sequence.request.number: sequence.count for sequence in plan.sequences}


def numbers(requests: Sequence[Request]) -> list[int]:
    return [request.number for request in requests]


def test_long_prompt_is_computed_in_chunks_and_samples_once_at_its_end(simulate) -> None:
    sim = simulate(num_pages=20, max_num_seqs=4, max_num_batched_tokens=8)
    request = sim.add(prompt=20, new=3)
    plans = sim.run(most_steps=10)
    sequences = [(s.start, s.count, s.samples) for plan in plans for s in plan.sequences]
    assert sequences == [(0, 8, False), (8, 8, False), (16, 4, True), (20, 1, True), (21, 1, True)]
    assert len(request.output) == 3
    sim.assert_idle()


def test_running_sequences_come_before_new_prompts_in_the_budget(simulate) -> None:
    sim = simulate(num_pages=40, max_num_seqs=4, max_num_batched_tokens=8)
    sim.add(prompt=4, new=20)
    sim.add(prompt=3, new=20)
    assert counts(sim.step()) == {0: 4, 1: 3}
    sim.add(prompt=30, new=1)
    assert counts(sim.step()) == {0: 1, 1: 1, 2: 6}
    assert counts(sim.step()) == {0: 1, 1: 1, 2: 6}


def test_requests_are_admitted_in_order_of_arrival_without_overtaking(simulate) -> None:
    sim = simulate(num_pages=10, max_num_seqs=8, max_num_batched_tokens=64)
    sim.add(prompt=24, new=1)  # 6 pages
    sim.add(prompt=20, new=1)  # 5 pages: must wait
    sim.add(prompt=4, new=1)  # would fit now
    assert counts(sim.step()) == {0: 24}
    assert numbers(sim.scheduler.waiting) == [1, 2]
    order = [number for plan in sim.run(most_steps=10) for number in counts(plan)]
    assert order == [1, 2]


def test_sequences_never_exceed_slots(simulate) -> None:
    sim = simulate(num_pages=50, max_num_seqs=3, max_num_batched_tokens=64)
    for _ in range(7):
        sim.add(prompt=2, new=4)
    plans = sim.run(most_steps=30)
    assert max(len(plan.sequences) for plan in plans) == 3
    sim.assert_idle()


def test_latest_request_is_preempted_and_recomputed_when_pages_run_out(simulate) -> None:
    sim = simulate(num_pages=5, max_num_seqs=2, max_num_batched_tokens=16)
    first, second = sim.add(prompt=8, new=9), sim.add(prompt=8, new=9)
    while not sim.counters.preemptions:
        sim.step()
    assert (first.status, second.status) == (Status.RUNNING, Status.WAITING)
    assert second.pages == [] and second.slot == -1 and second.metrics.preemptions == 1
    known = len(second.prompt) + second.num_sampled
    plans = sim.run(most_steps=30)
    again = next(s for plan in plans for s in plan.sequences if s.request is second)
    assert (again.start, again.count) == (0, known), "its prompt and what it had sampled are recomputed"
    assert (len(first.output), len(second.output)) == (9, 9)
    assert first.metrics.preemptions == 0
    sim.assert_idle()


def test_preempted_request_waits_until_its_sampled_token_is_read(simulate) -> None:
    sim = simulate(num_pages=5, max_num_seqs=2, max_num_batched_tokens=16)
    _, second = sim.add(prompt=8, new=9), sim.add(prompt=8, new=9)
    while not sim.counters.preemptions:
        in_flight = second.in_flight
        plan = sim.step()
    assert in_flight and not any(s.request is second for s in plan.sequences)
    for plan in sim.run(most_steps=30):
        for sequence in plan.sequences:
            assert sequence.start + sequence.count <= sequence.request.num_tokens


def test_idle_adapters_are_evicted_before_preemption(simulate) -> None:
    sim = simulate(num_pages=12, max_num_seqs=4, max_num_batched_tokens=32)
    sim.add(prompt=4, new=1, adapter="idle", adapter_pages=6)
    sim.run(most_steps=5)
    assert "idle" in sim.residency
    sim.add(prompt=16, new=25)
    sim.run(most_steps=40)
    assert "idle" not in sim.residency and sim.counters.preemptions == 0


def test_adapter_in_use_is_shared_and_loaded_once(simulate) -> None:
    sim = simulate(num_pages=20, max_num_seqs=4, max_num_batched_tokens=32)
    for _ in range(3):
        sim.add(prompt=4, new=3, adapter="a", adapter_pages=5)
    plan = sim.step()
    assert [resident.digest for resident in plan.loads] == ["a"]
    assert sim.allocator.count(PageKind.ADAPTER) == 5
    assert len({request.adapter_slot for request in sim.requests}) == 1
    assert not any(plan.loads for plan in sim.run(most_steps=10))


def test_request_whose_adapter_is_on_disk_is_overtaken_until_it_is_read(simulate) -> None:
    state = {"slow": AdapterState.LOADING, "ready": AdapterState.READY}
    sim = simulate(num_pages=20, max_num_seqs=4, max_num_batched_tokens=32, adapter_state=state.__getitem__)
    sim.add(prompt=4, new=2, adapter="slow", adapter_pages=2)
    sim.add(prompt=4, new=2, adapter="ready", adapter_pages=2)
    assert counts(sim.step()) == {1: 4}
    state["slow"] = AdapterState.READY
    assert 0 in counts(sim.step())
    sim.run(most_steps=10)
    sim.assert_idle()


def test_adapter_slots_bound_the_adapters_in_use(simulate) -> None:
    sim = simulate(num_pages=40, max_num_seqs=8, max_num_batched_tokens=64, adapter_slots=2)
    for name in "abcd":
        sim.add(prompt=4, new=3, adapter=name, adapter_pages=1)
    assert counts(sim.step()) == {0: 4, 1: 4}
    sim.run(most_steps=20)
    sim.assert_idle()


def test_policy_decides_admission_and_preemption(simulate) -> None:
    sim = simulate(num_pages=5, max_num_seqs=2, max_num_batched_tokens=16, policy=Lcfs())
    first, second = sim.add(prompt=8, new=9), sim.add(prompt=8, new=9)
    plan = sim.step()
    assert list(counts(plan)) == [1, 0]
    sim.run(most_steps=40)
    assert first.metrics.preemptions > 0 and second.metrics.preemptions == 0
    assert (len(first.output), len(second.output)) == (9, 9)


@pytest.mark.parametrize("steps", [0, 1, 2, 5])
def test_finish_frees_everything_at_once_in_any_state(simulate, steps: int) -> None:
    sim = simulate(num_pages=20, max_num_seqs=2, max_num_batched_tokens=8)
    request = sim.add(prompt=20, new=9, adapter="a", adapter_pages=3)
    for _ in range(steps):
        sim.step()
    sim.core.finish(request, FinishReason.CANCELLED)
    sim.assert_idle()
    finished = request.metrics.finished
    sim.steps += 1
    sim.core.finish(request, FinishReason.STOP)  # a no-op
    assert (request.finish_reason, request.metrics.finished) == (FinishReason.CANCELLED, finished)


def test_check_notices_a_leaked_page(simulate) -> None:
    sim = simulate(num_pages=20, max_num_seqs=2, max_num_batched_tokens=8)
    request = sim.add(prompt=9, new=9)
    sim.step()
    request.pages.pop()
    with pytest.raises(PoolError, match="leaked"):
        sim.scheduler.check()


def test_split_pool_bounds_each_kind_of_page(simulate):
    """Three adapters of 4 pages fit a unified pool; of a split pool with 8 adapter pages, only two do."""
    started = {}
    for adapter_pages in (None, 8):
        sim = simulate(num_pages=40, max_num_seqs=8, max_num_batched_tokens=64, adapter_pages=adapter_pages)
        for name in "abc":
            sim.add(4, 8, name, 4)
        sim.step()
        started[adapter_pages] = len(sim.scheduler.running)
        sim.run(60)
        sim.assert_idle()
    assert started == {None: 3, 8: 2}


def test_split_pool_does_not_evict_adapters_for_keys(simulate):
    sim = simulate(num_pages=16, max_num_seqs=2, max_num_batched_tokens=64, adapter_pages=8)
    sim.add(4, 2, "a", 8)
    sim.run(20)
    sim.add(30, 2)  # all 8 KV pages
    sim.run(20)
    assert "a" in sim.residency
    sim.assert_idle()


@pytest.mark.parametrize("ahead, started", [(MOST_PASSED_OVER, True), (MOST_PASSED_OVER + 1, False)])
def test_step_considers_a_bounded_part_of_the_queue(simulate, ahead, started):
    """Requests whose adapter is being read from disk are overtaken, but not by those far behind."""
    states = {"slow": AdapterState.LOADING, "ready": AdapterState.READY}
    sim = simulate(num_pages=64, max_num_seqs=4, max_num_batched_tokens=64, adapter_state=states.__getitem__)
    for _ in range(ahead):
        sim.add(4, 4, "slow", 1)
    behind = sim.add(4, 4, "ready", 1)
    sim.step()
    assert (behind in sim.scheduler.running) == started
    states["slow"] = AdapterState.READY
    sim.run(1000)
    sim.assert_idle()
