"""The sums of a step, against loops over its tokens."""

from itertools import groupby

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from slora_jax.scheduling import AdapterUse, Request, RequestMetrics, SamplingParams, ScheduledSequence
from slora_jax.simulation.work import step_work

RANKS = {"a": 8, "b": 16, "c": 8}
parts = st.lists(
    st.tuples(st.integers(0, 40), st.integers(1, 12), st.booleans(), st.sampled_from([None, *RANKS])), max_size=12
)


def sequence(start: int, count: int, samples: bool, name: str | None) -> ScheduledSequence:
    use = None if name is None else AdapterUse(name, name, np.full(7, RANKS[name], np.int32), 1)
    request = Request("r", 0, [0] * 99, SamplingParams(), 0, 1, use, RequestMetrics(0.0))
    return ScheduledSequence(request, start, count, samples)


@given(parts)
def test_the_sums_are_those_of_the_tokens(chosen) -> None:
    work = step_work([sequence(*part) for part in chosen], RANKS)
    decode = [part for part in chosen if part[1] == 1]
    prompts = [part for part in chosen if part[1] > 1]
    rows = [name for _, count, _, name in chosen for _ in range(count) if name]
    assert (work.decode_rows, work.prompts, work.sequences) == (len(decode), len(prompts), len(chosen))
    assert work.prefill_rows == sum(count for _, count, _, _ in prompts)
    assert work.rows == sum(count for _, count, _, _ in chosen)
    assert work.longest_prompt == max((count for _, count, _, _ in prompts), default=0)
    assert work.decode_context == sum(len(range(start + 1)) for start, *_ in decode)
    pairs = [(q, k) for start, count, *_ in prompts for q in range(start, start + count) for k in range(q + 1)]
    assert work.prefill_pairs == len(pairs)
    assert work.prefill_context == sum(len(range(start + count)) for start, count, *_ in prompts)
    assert work.sampled == sum(samples for _, _, samples, _ in chosen)
    assert work.lora_rows == len(rows)
    assert work.row_ranks == sum(RANKS[name] for name in rows)
    assert work.sequence_ranks == sum(RANKS[name] for *_, name in chosen if name)
    distinct = {RANKS[name] * 100 + ord(name) for name in rows}
    assert (work.adapters, work.adapter_ranks) == (len(distinct), sum(code // 100 for code in distinct))
    assert work.max_rank == max((RANKS[name] for name in rows), default=0)
    runs = [sum(count for _, count, _, _ in run) for name, run in groupby(chosen, lambda part: part[3]) if name]
    assert (work.segments, work.longest_segment) == (len(runs), max(runs, default=0))
