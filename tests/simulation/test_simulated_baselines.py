"""Each baseline changes its own rule and nothing else."""

from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from simulated import EFFICIENCY, SHAPE, device, random_workload

from slora_jax.errors import ConfigError
from slora_jax.metrics import serving_metrics
from slora_jax.simulation import CostModel, SimulatedRequest, StepWork, make_system, simulate

RANKS = [2, 4, 8, 2, 4, 8]
PAPER = {"num_tokens": 400, "max_num_batched_tokens": 100}


def times(result) -> list[tuple[float, ...]]:
    return [r.token_times for r in result.records]


def without_adapters(workload: list[SimulatedRequest]) -> list[SimulatedRequest]:
    return [replace(request, adapter=None) for request in workload]


@pytest.mark.parametrize("seed", range(3))
def test_the_base_system_ignores_adapters(seed) -> None:
    workload = random_workload(seed)
    base = simulate(workload, make_system("base-paper", **PAPER), SHAPE, device(), RANKS)
    plain = simulate(without_adapters(workload), make_system("slora-paper", **PAPER), SHAPE, device(), RANKS)
    assert times(base) == times(plain)
    assert base.counters.adapter_loads == 0


def test_one_packed_replica_is_the_base_system() -> None:
    workload = random_workload(4, adapters=1)
    packed = simulate(workload, make_system("packed-paper", **PAPER), SHAPE, device(), [8])
    base = simulate(workload, make_system("base-paper", **PAPER), SHAPE, device(), [8])
    assert times(packed) == times(base)


def test_packed_replicas_share_the_device_in_time_and_the_memory() -> None:
    """Two requests for two adapters: the steps of both take turns on one device, and each reads its own weights."""
    pair = [SimulatedRequest(0.0, adapter, 10, 200) for adapter in (0, 1)]
    packed = make_system("packed", page_size=8, replicas=2)
    computing = device().fitted("jax", step_seconds=0.0)
    one = simulate(pair[:1], make_system("packed", page_size=8), SHAPE, computing, [8]).seconds
    assert simulate(pair, packed, SHAPE, computing, [8, 8]).seconds == pytest.approx(2 * one, rel=0.01)
    tokens = [make_system("packed", page_size=8, replicas=m).pool_tokens(SHAPE, device()) for m in (1, 2)]
    weights = SHAPE.weight_bytes / SHAPE.kv_bytes
    assert tokens[1] == pytest.approx((tokens[0] - weights) / 2, abs=2)


def test_launches_of_one_replica_leave_the_device_to_the_other() -> None:
    """Steps of which launches take nine tenths: two replicas are hardly slower than one."""
    pair = [SimulatedRequest(0.0, adapter, 10, 100) for adapter in (0, 1)]
    plain = device()
    cost = CostModel(SHAPE, plain, "jax", "none")
    step = cost.step_seconds(StepWork(decode_rows=1, decode_context=60, sampled=1))
    slow = plain.fitted("jax", layer_seconds=10 * step / SHAPE.num_layers)
    packed = make_system("packed", page_size=8, replicas=2)
    one, two = (simulate(workload, packed, SHAPE, slow, [8, 8]).seconds for workload in (pair[:1], pair))
    assert one == pytest.approx(100 * 10 * step, rel=0.02)
    assert two < 1.02 * one


def test_an_idle_packed_replica_delays_no_other() -> None:
    """Whichever of the two gets its request late."""
    packed = make_system("packed", page_size=8, replicas=2)
    alone = simulate([SimulatedRequest(0.0, 0, 10, 20)], packed, SHAPE, device(), [8, 8]).seconds
    for late in (0, 1):
        workload = [SimulatedRequest(0.0, 1 - late, 10, 20), SimulatedRequest(100.0, late, 10, 20)]
        first, second = simulate(workload, packed, SHAPE, device(), [8, 8]).records
        assert first.finished == pytest.approx(alone)
        assert second.finished == pytest.approx(100 + alone)


def test_packed_replicas_that_do_not_fit_are_refused_with_the_arithmetic() -> None:
    system = make_system("packed", replicas=100)
    with pytest.raises(ConfigError, match="out of memory: 100 x 0.0 GB of weights"):
        simulate([SimulatedRequest(0.0, 0, 1, 1)], system, SHAPE, device(), [8])
    with pytest.raises(ConfigError, match="3 adapters need as many replicas, not 2"):
        simulate([SimulatedRequest(0.0, 0, 1, 1)], make_system("packed", replicas=2), SHAPE, device(), [8] * 3)


def unified_and_split(admission: str):
    """Systems of 500 tokens: unified, and with 100 to 300 of them for adapters."""
    settings = {
        "page_size": 1,
        "max_num_batched_tokens": 1000,
        "admission": admission,
        "prefetch": 0,
        "max_num_seqs": 100,
    }
    yield make_system("slora", num_tokens=500, **settings)
    for adapters in (100, 200, 300):
        split = {"num_tokens": 500 - adapters, "adapter_tokens": adapters, "gathers_on_load": False}
        yield make_system("no-unify-mem", **settings, **split)


@pytest.mark.parametrize("admission", ["optimistic", "reserve"])
@settings(max_examples=30)
@given(seed=st.integers(0, 2**32 - 1))
def test_unified_memory_admits_at_least_as_many_as_any_split_of_the_same(admission, seed) -> None:
    """In the first step, from a queue in which all requests arrived at once."""
    at_once = [replace(request, arrival=0.0) for request in random_workload(seed, requests=40)]
    unified, *splits = (
        sum(record.admitted == 0.0 for record in simulate(at_once, system, SHAPE, device(), RANKS).records)
        for system in unified_and_split(admission)
    )
    assert unified >= max(splits), f"seed {seed}"


@pytest.mark.parametrize("seed", range(3))
def test_unified_memory_queues_less_than_any_split_of_the_same(seed) -> None:
    """Without preemption. (Optimistic admission may admit so many requests that they preempt each other.)"""
    workload = random_workload(seed, requests=120)
    unified, *splits = (
        serving_metrics(simulate(workload, system, SHAPE, device(), RANKS).records).queue_time.mean
        for system in unified_and_split("reserve")
    )
    assert unified < min(splits)


def test_split_memory_holds_no_more_adapters_than_their_part() -> None:
    system = make_system(
        "no-unify-mem-paper", num_tokens=300, adapter_tokens=40, max_num_batched_tokens=100, page_size=1
    )
    result = simulate(random_workload(2), system, SHAPE, device(), RANKS, sample_seconds=0.01)
    held = [sample.pages.adapter_in_use + sample.pages.adapter_idle for sample in result.pool]
    assert 32 <= max(held) <= 40
    assert {sample.pages.total for sample in result.pool} == {340}


@pytest.mark.parametrize("prefetch", [0, 8])
def test_gathering_copies_all_resident_adapters_on_each_load(prefetch) -> None:
    workload = [SimulatedRequest(0.0, 0, 2, 40), SimulatedRequest(0.02, 1, 2, 2)]
    settings = {
        "num_tokens": 300,
        "adapter_tokens": 100,
        "max_num_batched_tokens": 100,
        "admit_every": 1,
        "eviction": "lru",
    }
    system = make_system("no-unify-mem-paper", prefetch=prefetch, **settings)
    seconds = [
        simulate(workload, replace(system, gathers_on_load=gathers), SHAPE, device(), [8, 4]).counters.device_seconds
        for gathers in (True, False)
    ]
    gathered = (8 + (8 + 4)) * SHAPE.lora_bytes  # at the first load, and at the second
    assert seconds[0] - seconds[1] == pytest.approx(2 * gathered / (0.8 * device().memory_bandwidth))


def test_merge_switches_adapters_and_pays_for_it() -> None:
    workload = [SimulatedRequest(0.0, adapter, 4, 4) for adapter in (0, 1, 0, None)]
    result = simulate(workload, make_system("merge-paper", **PAPER), SHAPE, device(), [8, 4])
    cost = CostModel(SHAPE, device(), "pytorch", "none")
    # 0 (with the third request), then 1, then the base model
    assert result.counters.adapter_merges == 3
    switched = 2 * cost.merge_seconds(8) + 2 * cost.merge_seconds(4)
    steps = sum(_device_seconds(cost, rows) for rows in (2, 1, 1))
    assert result.counters.device_seconds == pytest.approx(switched + steps)
    assert result.records[2].finished <= result.records[1].admitted < result.records[3].admitted


def _device_seconds(cost: CostModel, rows: int) -> float:
    """Returns the seconds of a batch of `rows` prompts of 4 tokens, with 4 new tokens each."""
    prefill = StepWork(
        prefill_rows=4 * rows, prefill_pairs=10 * rows, prefill_context=4 * rows, prompts=rows, sampled=rows
    )
    decode = [StepWork(decode_rows=rows, decode_context=rows * (4 + i), sampled=rows) for i in (1, 2, 3)]
    return sum(cost.busy_seconds(work) for work in (prefill, *decode))


def test_peft_runs_static_padded_batches_of_one_adapter() -> None:
    """By hand: two requests of one adapter padded to 6 tokens, the shorter row dropped after its 2 tokens; a third,
    which arrives during the batch, waits for the next sweep."""
    workload = [SimulatedRequest(0.0, 0, 4, 3), SimulatedRequest(0.0, 0, 6, 2), SimulatedRequest(1e-3, 0, 4, 1)]
    result = simulate(workload, make_system("peft", offline_batch=6), SHAPE, device(), [8])
    cost = CostModel(SHAPE, device(), "peft", "segmented")

    def step(rows: int, padded: int, i: int) -> float:
        lora = {"lora_rows": rows, "row_ranks": 8 * rows, "adapters": 1, "adapter_ranks": 8}
        if i:
            work = StepWork(decode_rows=rows, decode_context=rows * (padded + i), sampled=rows, **lora)
        else:
            n = rows * padded
            lora |= {"lora_rows": n, "row_ranks": 8 * n}
            pairs = rows * padded * (padded + 1) // 2
            work = StepWork(prefill_rows=n, prefill_pairs=pairs, prefill_context=n, prompts=rows, sampled=n, **lora)
        copied = 2 * rows * (padded + i) * SHAPE.kv_bytes if i else 0
        return cost.step_seconds(work) + cost.host_seconds(work) + 2 * copied / (0.8 * device().memory_bandwidth)

    wrap = EFFICIENCY.adapter_wrap_seconds
    first, second = wrap + step(2, 6, 0), wrap + step(2, 6, 0) + step(2, 6, 1)
    third = second + step(1, 6, 2)
    assert result.records[0].token_times == pytest.approx((first, second, third))
    assert result.records[1].token_times == pytest.approx((first, second))
    assert result.records[2].token_times == pytest.approx((third + wrap + step(1, 4, 0),))
    assert result.records[2].admitted == pytest.approx(third + wrap)


def test_peft_batches_no_more_than_its_number() -> None:
    workload = [SimulatedRequest(0.0, 0, 4, 2) for _ in range(5)]
    admitted = [
        r.admitted for r in simulate(workload, make_system("peft", offline_batch=2), SHAPE, device(), [8]).records
    ]
    assert admitted[0] == admitted[1] < admitted[2] == admitted[3] < admitted[4]
