"""Copies and disk reads on their own lanes, computed by hand."""

import math
from dataclasses import replace

import pytest
from simulated import EFFICIENCY, SHAPE, device

from slora_jax.scheduling import EarlyAbort
from slora_jax.simulation import CostModel, SimulatedRequest, StepWork, make_system, simulate
from slora_jax.simulation.loading import HostStore, Lane

RANK = 64
COPY = EFFICIENCY.adapter_load_seconds + RANK * SHAPE.lora_bytes / (0.5 * 2e7)
HOST = EFFICIENCY.host_step_seconds + EFFICIENCY.host_sequence_seconds
ON_ADMISSION = make_system("slora", page_size=8, num_tokens=4000, max_num_batched_tokens=256, prefetch=0)
PREFETCH = make_system("slora", page_size=8, num_tokens=4000, max_num_batched_tokens=256)
TWO = [SimulatedRequest(0.0, None, 100, 50), SimulatedRequest(0.05, 0, 2, 2)]
"""A request for the base model, and one for an adapter while it runs."""


def prefill(rank: int, tokens: int = 2) -> float:
    cost = CostModel(SHAPE, device(), "jax", "segmented")
    return cost.step_seconds(
        StepWork(
            prefill_rows=tokens, prefill_pairs=tokens * (tokens + 1) // 2, prefill_context=tokens, prompts=1,
            sampled=1, lora_rows=tokens, row_ranks=tokens * rank, sequence_ranks=rank, adapters=1, adapter_ranks=rank,
            max_rank=rank,
        )
    )  # fmt: skip


@pytest.mark.parametrize("system", [ON_ADMISSION, make_system("slora-paper", num_tokens=4000)])
def test_a_lone_request_waits_for_its_adapter_before_its_first_step(system) -> None:
    result = simulate([SimulatedRequest(0.0, 0, 2, 1)], system, SHAPE, device(), [RANK])
    assert result.records[0].first_token == pytest.approx(HOST + COPY + prefill(RANK), rel=0.02)
    assert result.counters.stall_seconds == pytest.approx(COPY)
    assert result.counters.copy_seconds == pytest.approx(COPY)


def test_two_adapters_are_copied_one_after_the_other() -> None:
    pair = [SimulatedRequest(0.0, adapter, 2, 1) for adapter in (0, 1)]
    result = simulate(pair, ON_ADMISSION, SHAPE, device(), [RANK, RANK])
    assert result.counters.stall_seconds == pytest.approx(2 * COPY)


def longest_gap(result) -> float:
    return max(result.records[0].inter_token_latencies)


def test_loading_on_admission_stalls_the_others_and_prefetch_does_not() -> None:
    slow = device(host_to_device_bandwidth=1e6)
    copy = EFFICIENCY.adapter_load_seconds + RANK * SHAPE.lora_bytes / (0.5 * 1e6)
    stalled = simulate(TWO, ON_ADMISSION, SHAPE, slow, [RANK])
    ahead = simulate(TWO, PREFETCH, SHAPE, slow, [RANK])
    alone = simulate(TWO[:1], PREFETCH, SHAPE, slow, [RANK])
    assert copy > 10 * longest_gap(alone)
    assert longest_gap(stalled) > copy
    assert stalled.counters.stall_seconds == pytest.approx(copy, rel=0.2)
    assert longest_gap(ahead) < 2 * longest_gap(alone)  # the step that prefills the second request, at most
    left = 0.05 + copy - ahead.records[0].finished  # of the copy, when no request runs any more
    assert ahead.counters.stall_seconds == pytest.approx(left, abs=longest_gap(alone))
    assert ahead.counters.copy_seconds == stalled.counters.copy_seconds == pytest.approx(copy)
    assert ahead.records[1].first_token >= 0.05 + copy  # its own request cannot be faster than the copy
    assert ahead.records[0].finished < stalled.records[0].finished


def test_a_lone_request_waits_for_its_pages_to_land() -> None:
    """In four uploads of at most 8 of its 32 pages, of which two steps' worth may be in flight."""
    system = replace(PREFETCH, upload_pages_per_step=8)
    result = simulate([SimulatedRequest(0.0, 0, 2, 1)], system, SHAPE, device(), [RANK])
    copied = COPY + 3 * EFFICIENCY.adapter_load_seconds
    assert result.records[0].first_token == pytest.approx(copied + HOST + prefill(RANK), rel=0.02)
    assert result.counters.stall_seconds == pytest.approx(copied)
    assert result.counters.copy_seconds == pytest.approx(copied)
    hits = (result.counters.adapter_loads, result.counters.prefetch_hits)
    assert hits == (1, 0)  # the request was there before its adapter had landed


def test_prefetched_copies_run_while_their_requests_wait_for_room() -> None:
    """Three requests of three adapters, one at a time: with prefetch, only the first waits for its copy."""
    system = make_system("slora", page_size=8, num_tokens=4000, max_num_seqs=1, max_num_batched_tokens=256)
    three = [SimulatedRequest(0.0, adapter, 50, 30) for adapter in range(3)]
    on_admission = simulate(three, replace(system, prefetch=0), SHAPE, device(), [64] * 3)
    ahead = simulate(three, system, SHAPE, device(), [64] * 3)
    assert on_admission.counters.stall_seconds == pytest.approx(3 * COPY)
    assert on_admission.seconds - ahead.seconds == pytest.approx(2 * COPY, rel=0.05)
    assert ahead.counters.stall_seconds == pytest.approx(COPY)
    assert ahead.counters.prefetch_hits == 2


def test_samples_show_bytes_on_their_way() -> None:
    result = simulate(TWO, PREFETCH, SHAPE, device(), [RANK], sample_seconds=COPY / 2)
    uploading = [sample.uploading for sample in result.pool]
    assert max(uploading) == RANK * SHAPE.lora_bytes and uploading[-1] == 0


def test_a_lane_does_one_thing_at_a_time() -> None:
    lane = Lane()
    assert [lane.take(1.0, 2.0), lane.take(1.5, 1.0), lane.take(10.0, 1.0)] == [3.0, 4.0, 11.0]
    assert lane.busy == 4.0


def test_the_host_store_keeps_the_last_used_and_reads_the_others_from_disk() -> None:
    store = HostStore({"a": 10, "b": 10, "c": 10}, budget=20, disk_bandwidth=10.0)  # a read takes 1 s
    assert store.ready("c", 0.0) and store.ready("b", 0.0)
    assert not store.ready("a", 0.0)
    assert store.next_arrival(0.0) == 1.0
    assert not store.ready("a", 0.9)
    assert store.ready("a", 1.0)  # now b and a are there: c was used before b
    assert store.ready("b", 1.0) and not store.ready("c", 1.0)
    assert (store.next_arrival(1.0), store.next_arrival(2.0)) == (2.0, math.inf)
    assert store.reads == 2 and store.disk.busy == 2.0


def test_requests_whose_adapter_comes_from_disk_are_overtaken_and_wait_for_it() -> None:
    """Host memory holds one of two adapters; a read takes 100 ms."""
    nbytes = RANK * SHAPE.lora_bytes
    system = make_system(
        "slora", page_size=8, num_tokens=4000, max_num_batched_tokens=256, prefetch=0, host_adapter_bytes=nbytes,
        disk_bandwidth=nbytes / 0.1,
    )  # fmt: skip
    workload = [SimulatedRequest(0.0, 0, 2, 2), SimulatedRequest(0.01, 1, 2, 2)]
    result = simulate(workload, system, SHAPE, device(), [RANK, RANK])
    first, second = result.records
    assert result.counters.disk_reads == 1
    assert first.first_token == pytest.approx(0.1 + HOST + COPY + prefill(RANK), rel=0.02)
    assert second.first_token < 0.05


def test_more_adapters_than_are_copied_ahead_are_served_all_the_same() -> None:
    """100 at once, of which 8 are copied ahead of their turn."""
    system = make_system("slora", page_size=8, num_tokens=40_000, max_num_seqs=100, max_num_batched_tokens=4000)
    workload = [SimulatedRequest(i * 1e-4, i, 2, 3) for i in range(100)]
    result = simulate(workload, system, SHAPE, device(), [8] * 100)
    assert all(record.completed for record in result.records)
    assert result.counters.adapter_loads == 100


def test_a_request_waits_for_its_copy_even_if_others_landed_for_requests_that_are_gone() -> None:
    """A read from disk that no request waits for any more must not hide the copy that a request waits for."""
    nbytes = 64 * SHAPE.lora_bytes
    system = make_system(
        "slora", page_size=8, num_tokens=4000, host_adapter_bytes=nbytes, disk_bandwidth=nbytes / 0.1, overlap=False
    )
    workload = [SimulatedRequest(0.0, 0, 2, 2), SimulatedRequest(0.001, 1, 2, 2), SimulatedRequest(0.3, 2, 2, 2)]
    policy = EarlyAbort(slo=0.15, margin=0.01, rule="code")
    result = simulate(workload, system, SHAPE, device(), [64] * 3, policy=policy)
    assert [record.completed for record in result.records] == [True, False, True]
