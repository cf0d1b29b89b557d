"""Reserve-all-output admission: the formula against a count step by step, and what it promises."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from slora_jax.errors import ConfigError
from slora_jax.scheduling import FinishReason, SchedulerLimits
from slora_jax.scheduling.reservation import peak

sequences = st.lists(st.tuples(st.integers(1, 30), st.integers(0, 30)), min_size=1, max_size=8)


@given(sequences)
def test_the_formula_is_the_peak_of_all_sequences_generating_in_step(pairs) -> None:
    """(tokens held, tokens to come) of each: after s steps, those that have not ended hold s tokens more."""
    counted = max(sum(used + s for used, left in pairs if left >= s) for s in range(31))
    used, left = np.array(sorted(pairs, key=lambda pair: -pair[1])).T
    assert peak(used, left) == counted


requests = st.lists(st.tuples(st.integers(1, 20), st.integers(1, 20), st.sampled_from([None, "a", "b"])), max_size=20)
ADAPTER_PAGES = {None: 0, "a": 2, "b": 5}


@settings(max_examples=150)
@given(requests, st.integers(0, 30), st.integers(1, 8), st.lists(st.integers(0, 4), min_size=20, max_size=20))
def test_nobody_is_preempted_when_prompts_take_one_step_and_all_finish(
    simulate, requests, spare, max_seqs, gaps
) -> None:
    pages = max((-(-(p + n - 1) // 4) + ADAPTER_PAGES[a] for p, n, a in requests), default=1) + spare
    sim = simulate(pages, max_seqs, max_tokens=1000, admission="reserve")
    for (prompt, new, adapter), gap in zip(requests, gaps, strict=False):
        sim.add(prompt, new, adapter, ADAPTER_PAGES[adapter])
        for _ in range(gap):
            sim.step()
    sim.run(most_steps=1000)
    sim.assert_idle()
    assert sim.scheduler.preemptions == 0
    assert all(r.finish_reason is FinishReason.STOP and len(r.output) == r.max_new for r in sim.requests)


def test_optimistic_admission_takes_more_in_and_preempts(simulate) -> None:
    most, preemptions = {}, {}
    for admission in ("optimistic", "reserve"):
        sim = simulate(num_pages=12, max_seqs=8, max_tokens=64, admission=admission)
        for _ in range(8):
            sim.add(prompt=4, new=20)
        most[admission] = max(len(plan.sequences) for plan in sim.run(most_steps=400))
        preemptions[admission] = sim.scheduler.preemptions
    assert most["optimistic"] > most["reserve"] >= 1
    assert preemptions["optimistic"] > 0 == preemptions["reserve"]


def test_short_requests_make_room_for_long_ones(simulate) -> None:
    """The sum of final lengths is 4 + 9 pages, of 12; but the short one is gone when the long one needs its last."""
    sim = simulate(num_pages=12, max_seqs=8, max_tokens=64, admission="reserve")
    sim.add(prompt=4, new=33)  # 9 pages
    sim.add(prompt=13, new=2)  # 4 pages
    assert len(sim.step().sequences) == 2
    sim.run(most_steps=60)
    assert sim.scheduler.preemptions == 0


def test_unknown_admission_is_refused() -> None:
    with pytest.raises(ConfigError, match="admission='eager'.*optimistic.*reserve"):
        SchedulerLimits(1, 1, 1, "eager")
