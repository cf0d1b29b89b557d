"""A workload is the same requests for the simulator and for real engines, open or closed."""

from collections import Counter
from dataclasses import replace

import numpy as np
import pytest

from experiments.workloads import (
    INDEPENDENT,
    Workload,
    closed_loop,
    conversations,
    engine_requests,
    shared_prefix,
    simulated_requests,
    synthetic,
)
from slora_jax import ConfigError
from slora_jax.simulation import DeviceModel, ModelShape, SimulatedRequest, load_device, make_system, simulate

COMMON = {"num_adapters": 6, "ranks": (8, 16), "rate": 4.0, "duration": 20.0, "seed": 3}
SHAPE = ModelShape(4, 256, 256, 256, 512, 1000)


@pytest.fixture(scope="module")
def a10g() -> DeviceModel:
    return load_device("a10g")


def run(workload: Workload, device: DeviceModel, **system):
    system = make_system("slora", **{"page_size": 8, "num_tokens": 20_000} | system)
    return simulate(simulated_requests(workload), system, SHAPE, device, workload.ranks)


def test_both_runners_get_the_same_requests() -> None:
    for make in (synthetic, shared_prefix, conversations):
        work = make(**COMMON)
        ours, theirs = simulated_requests(work), engine_requests(work, 1000)
        assert len(ours) == len(theirs) == len(work)
        for i, (a, b) in enumerate(zip(ours, theirs, strict=True)):
            assert a.arrival == b.arrival == work.arrival[i]
            assert a.adapter == int(b.adapter) == work.adapter[i]
            assert a.prompt_tokens == len(b.prompt) == work.prompt_tokens[i]
            assert a.output_tokens == b.output == work.output_tokens[i]
            assert a.after == b.after


def test_prompts_share_as_many_tokens_in_both_runners() -> None:
    """Pairwise: equal beginnings of the engine's prompts are as long as those of the simulator's, up to chance."""
    work = shared_prefix(**COMMON | {"duration": 10.0}, prefix_tokens=28, texts=2, input_range=(1, 20))
    shorter = work.prefix_tokens - np.arange(len(work)) % 5 * 7  # some share less of their text, some nothing
    for load in (work, replace(work, prefix_tokens=shorter), conversations(**COMMON | {"duration": 10.0})):
        simulated = [request.prompt(i) for i, request in enumerate(simulated_requests(load))]
        real = [request.prompt for request in engine_requests(load, 2**31)]
        shared = [
            [equal_beginning(prompts[i], prompts[j]) for i in range(len(load)) for j in range(i)]
            for prompts in (simulated, real)
        ]
        assert shared[0] == shared[1] and max(shared[0]) > 10


def equal_beginning(one, other) -> int:
    return next((k for k, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other)))


def test_token_ids_follow_from_the_seed_and_the_number_alone() -> None:
    work = shared_prefix(**COMMON)
    prompts = [request.prompt for request in engine_requests(work, 100, seed=1)]
    assert prompts == [request.prompt for request in engine_requests(work, 100, seed=1)]
    assert prompts != [request.prompt for request in engine_requests(work, 100, seed=2)]
    assert {token for prompt in prompts for token in prompt} == set(range(100))
    fields = ("arrival", "adapter", "prompt_tokens", "output_tokens", "prefix_text", "prefix_tokens")
    first = replace(work, **{field: getattr(work, field)[:9] for field in fields})
    assert [request.prompt for request in engine_requests(first, 100, seed=1)] == prompts[:9]


def test_base_model_requests_have_no_adapter() -> None:
    work = synthetic(**COMMON | {"num_adapters": 0})
    assert {request.adapter for request in simulated_requests(work)} == {None}
    assert {request.adapter for request in engine_requests(work, 100)} == {None}


# Prefix cache


def test_a_prefix_cache_saves_what_the_workload_shares(a10g) -> None:
    """All but the first prompt with a text find its full pages, in a pool with room, if they come one at a time."""
    work = closed_loop(shared_prefix(**COMMON, prefix_tokens=64, texts=2), users=1)
    counters = run(work, a10g, prefix_cache=True).counters
    first = len(set(work.prefix_text.tolist()))
    assert counters.prefix_hit_tokens == 64 * (len(work) - first)
    assert run(work, a10g, prefix_cache=False).counters.prefix_hit_tokens == 0


def test_a_turn_finds_the_pages_of_the_turn_before(a10g) -> None:
    work = conversations(**COMMON, turns=4, think_seconds=1.0)
    result = run(work, a10g, prefix_cache=True)
    before = work.prompt_tokens.reshape(-1, 4)[:, :-1]
    assert result.counters.prefix_hit_tokens == int((before // 8 * 8).sum())
    for i, record in enumerate(result.records):
        if i % 4:
            assert record.arrival == result.records[i - 1].finished + 1.0


# Closed loops


def test_a_closed_loop_keeps_the_requests_and_their_order() -> None:
    work = shared_prefix(**COMMON)
    closed = closed_loop(work, 7, 2.5)
    assert closed.after.tolist() == [INDEPENDENT] * 7 + list(range(len(work) - 7))
    assert closed.arrival.tolist() == [0.0] * 7 + [2.5] * (len(work) - 7)
    assert [r.prompt for r in engine_requests(closed, 99)] == [r.prompt for r in engine_requests(work, 99)]
    alike = [replace(r, arrival=0.0, after=None) for r in simulated_requests(closed)]
    assert alike == [replace(r, arrival=0.0) for r in simulated_requests(work)]


def test_as_many_users_as_requests_is_all_at_the_start() -> None:
    work = synthetic(**COMMON)
    at_once = [replace(request, arrival=0.0) for request in simulated_requests(work)]
    assert simulated_requests(closed_loop(work, len(work))) == at_once
    assert simulated_requests(closed_loop(work, len(work) + 5)) == at_once


@pytest.mark.parametrize(("users", "think"), [(0, 0.0), (1, -1.0), (1, float("inf")), (1, float("nan"))])
def test_a_loop_without_users_or_with_a_wrong_thinking_time_is_refused(users, think) -> None:
    with pytest.raises(ConfigError, match=f"users={users}, think_seconds={think}"):
        closed_loop(synthetic(**COMMON), users, think)


def test_a_workload_with_its_own_loop_takes_no_other() -> None:
    with pytest.raises(ConfigError, match="follow others already"):
        closed_loop(conversations(**COMMON), 4)
    assert Counter(r.after is None for r in simulated_requests(conversations(**COMMON))) == {True: 13, False: 65}


def test_no_prefix_and_no_predecessor_are_none_in_the_simulator() -> None:
    one = np.array([0])
    work = Workload(np.array([0.5]), one, one + 5, one + 2, (8,), one + 3, one, one + INDEPENDENT)
    assert simulated_requests(work) == [SimulatedRequest(0.5, 0, 5, 2)]
