"""Reserve-all-output admission: its formula against a count step by step, and no preemption."""

import numpy as np
import pytest
from fake_executor import FakeExecutor
from hypothesis import given
from hypothesis import strategies as st
from make_request import make_request

from slora_jax.errors import ConfigError
from slora_jax.memory import AdapterResidency, Evictor, Immediate, PageAllocator
from slora_jax.scheduling import CoreConfig, Fcfs, FinishReason
from slora_jax.scheduling.reservation import peak
from slora_jax.simulation import make_system
from slora_jax.simulation.scheduler import SimulatedScheduler

sequences = st.lists(st.tuples(st.integers(1, 30), st.integers(0, 30)), min_size=1, max_size=8)


@given(sequences)
def test_peak_formula_agrees_with_a_count_step_by_step(pairs) -> None:
    """pairs: (tokens held, tokens to come). After s steps, each unfinished sequence holds s tokens more."""
    counted = max(sum(used + s for used, left in pairs if left >= s) for s in range(31))
    used, left = np.array(sorted(pairs, key=lambda pair: -pair[1])).T
    assert peak(used, left) == counted


requests = st.lists(st.tuples(st.integers(1, 20), st.integers(1, 20), st.sampled_from([None, "a", "b"])), max_size=20)
ADAPTER_PAGES = {None: 0, "a": 2, "b": 5}


@given(requests, st.integers(0, 30), st.integers(1, 8), st.lists(st.integers(0, 4), min_size=20, max_size=20))
def test_reserve_never_preempts_and_all_finish(simulate, requests, spare, max_num_seqs, gaps) -> None:
    pages = max((-(-(p + n - 1) // 4) + ADAPTER_PAGES[a] for p, n, a in requests), default=1) + spare
    sim = simulate(pages, max_num_seqs, max_num_batched_tokens=1000, admission="reserve")
    for (prompt, new, adapter), gap in zip(requests, gaps, strict=False):
        sim.add(prompt, new, adapter, ADAPTER_PAGES[adapter])
        for _ in range(gap):
            sim.step()
    sim.run(most_steps=1000)
    sim.assert_idle()
    assert sim.counters.preemptions == 0
    assert all(r.finish_reason is FinishReason.LENGTH and len(r.output) == r.max_new for r in sim.requests)


def test_optimistic_admission_admits_more_and_preempts(simulate) -> None:
    most, preemptions = {}, {}
    for admission in ("optimistic", "reserve"):
        sim = simulate(num_pages=12, max_num_seqs=8, max_num_batched_tokens=64, admission=admission)
        for _ in range(8):
            sim.add(prompt=4, new=20)
        most[admission] = max(len(plan.sequences) for plan in sim.run(most_steps=400))
        preemptions[admission] = sim.counters.preemptions
    assert most["optimistic"] > most["reserve"] >= 1
    assert preemptions["optimistic"] > 0 == preemptions["reserve"]


def test_short_requests_make_room_for_long_ones(simulate) -> None:
    """Final lengths sum to 4 + 9 of 12 pages, but the short request ends before the long one needs its last page."""
    sim = simulate(num_pages=12, max_num_seqs=8, max_num_batched_tokens=64, admission="reserve")
    sim.add(prompt=4, new=33)  # 9 pages
    sim.add(prompt=13, new=2)  # 4 pages
    assert len(sim.step().sequences) == 2
    sim.run(most_steps=60)
    assert sim.counters.preemptions == 0


def test_unknown_admission_is_refused() -> None:
    with pytest.raises(ConfigError, match="admission='eager'.*optimistic.*reserve"):
        CoreConfig(admission="eager")


def code_admits(running, candidate, total: int) -> bool:
    """S-LoRA's `ReqQueue._can_add_new_req`. Requests: (prompt, tokens so far, all tokens, adapter, its slots)."""
    cache = [(prompt + done, new - done - 1) for prompt, done, new, _, _ in running]
    cache.append((candidate[0] + 1, candidate[2] - 1))
    adapters = {name: slots for *_, name, slots in [*running, candidate] if name is not None}
    cache.sort(key=lambda pair: -pair[1])
    has, left = np.array(cache).T
    needed = (left * np.arange(1, len(cache) + 1) + np.cumsum(has)).max()
    return needed < total - sum(adapters.values())


SLOTS = {None: 0, "a": 32, "b": 64}
jobs = st.tuples(st.integers(1, 60), st.integers(2, 60), st.sampled_from([None, "a", "b"]))


@given(st.lists(jobs, min_size=1, max_size=10), jobs, st.integers(1, 20), st.integers(200, 1500))
def test_reserve_agrees_with_the_papers_code_up_to_a_token_per_sequence(requests, candidate, steps, pages) -> None:
    """Our pages are held one step longer, because ends are read late; the code counts a token before it is computed."""
    residency = AdapterResidency(Evictor(PageAllocator(pages + 1), Immediate()), 64)
    system = make_system("slora-paper", max_num_seqs=64, max_num_batched_tokens=10_000, admit_every=1)
    sched = SimulatedScheduler(residency, Fcfs(), system, FakeExecutor())

    def add(number, job):
        prompt, new, adapter = job
        sched.add(make_request(number, prompt=prompt, new=new, adapter=adapter, adapter_pages=SLOTS[adapter]))

    for number, job in enumerate(requests):
        if job[0] + job[1] + SLOTS[job[2]] < pages:
            add(number, job)
    for step in range(steps):
        for s in sched.schedule(float(step)).sequences:
            s.request.output.append(0)
            if len(s.request.output) == s.request.max_new:
                sched.finish(s.request, FinishReason.LENGTH, float(step))
    if sched.waiting or not sched.running:
        return
    running = [(len(r.prompt), len(r.output), r.max_new, r.digest, SLOTS[r.digest]) for r in sched.running]
    prompt, new, adapter = candidate
    add(99, candidate)
    sched.schedule(99.0)
    admitted = not sched.waiting
    asked = (prompt, 0, new, adapter, SLOTS[adapter])
    spare = len(running) + 2
    if admitted:
        assert code_admits(running, asked, pages + 1)
    else:
        assert not code_admits(running, asked, pages - spare)
