"""Fast forward changes nothing: against the same run step by step, bit by bit."""

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from simulated import SHAPE, device, random_workload

from slora_jax.metrics import serving_metrics
from slora_jax.scheduling import Ageing, Clustering, EarlyAbort, Fcfs, Lcfs, OneAdapter, Policy, Vtc
from slora_jax.simulation import SimulatedRequest, SystemConfig, make_system, simulate
from slora_jax.simulation import replica as replica_module

RANKS = [2, 4, 8, 2, 4, 8]
POLICIES: dict[str, Policy] = {
    "fcfs": Fcfs(),
    "lcfs": Lcfs(),
    "early_abort, code": EarlyAbort(slo=0.3, margin=0.02, rule="code"),
    "early_abort, paper": EarlyAbort(slo=0.3, margin=0.02),
    "clustering, soft": Clustering(2),
    "clustering, hard": Clustering(2, hard=True),
    "vtc": Vtc(weights={"0": 2.0}),
    "one_adapter": OneAdapter(3),
    "ageing of lcfs": Ageing(Lcfs(), bound=0.2),
}
SYSTEMS = {
    "slora": {"page_size": 8, "num_tokens": 400, "max_num_seqs": 12, "max_num_batched_tokens": 64},
    "slora-paper": {"num_tokens": 400, "max_num_batched_tokens": 100},
    "no-unify-mem-paper": {"num_tokens": 300, "adapter_tokens": 100, "max_num_batched_tokens": 100},
    "bmm-paper": {"num_tokens": 300, "max_num_batched_tokens": 100},
    "merge-paper": {"num_tokens": 400, "max_num_batched_tokens": 100},
    "base": {"page_size": 8, "num_tokens": 400, "max_num_seqs": 12, "max_num_batched_tokens": 64},
}


def partly_closed(seed: int) -> list[SimulatedRequest]:
    """A random workload in which most requests follow another one, at once or soon after."""
    random = np.random.default_rng(seed)
    workload = random_workload(seed)
    think = random.choice([0.0, 0.01, 0.1], len(workload))
    return [
        replace(request, arrival=float(think[i]), after=int(random.integers(max(0, i - 15), i)))
        if i and random.random() < 0.8
        else request
        for i, request in enumerate(workload)
    ]


def assert_same(system: SystemConfig, policy: Policy | None, seed: int, closed: bool = False) -> None:
    workload = partly_closed(seed) if closed else random_workload(seed)
    run = [
        simulate(workload, system, SHAPE, device(), RANKS, policy=policy, sample_seconds=0.05, fast_forward=fast)
        for fast in (True, False)
    ]
    assert run[0].records == run[1].records, f"seed {seed}"  # times included
    assert run[0].counters == run[1].counters, f"seed {seed}"
    assert run[0].pool == run[1].pool, f"seed {seed}"
    assert run[0].abort_reasons == run[1].abort_reasons, f"seed {seed}"


@pytest.mark.parametrize("policy", POLICIES)
@settings(max_examples=8)
@given(name=st.sampled_from(["slora", "slora-paper"]), seed=st.integers(0, 2**32 - 1), closed=st.booleans())
def test_every_policy(name: str, policy: str, seed: int, closed: bool) -> None:
    assert_same(make_system(name, **SYSTEMS[name]), POLICIES[policy], seed, closed)


@pytest.mark.parametrize("name", SYSTEMS)
@settings(max_examples=6)
@given(seed=st.integers(0, 2**32 - 1), closed=st.booleans())
def test_every_system(name: str, seed: int, closed: bool) -> None:
    assert_same(make_system(name, **SYSTEMS[name]), None, seed, closed)


@settings(max_examples=30)
@given(
    seed=st.integers(0, 2**32 - 1),
    closed=st.booleans(),
    changes=st.fixed_dictionaries(
        {
            "overlap": st.booleans(),
            "prefetch": st.sampled_from([0, 2, 8]),
            "upload_pages_per_step": st.sampled_from([1, 32]),
            "prefix_cache": st.booleans(),
            "mixed": st.booleans(),
            "admit_every": st.sampled_from([1, 3, 10]),
            "admission": st.sampled_from(["optimistic", "reserve"]),
            "eviction": st.sampled_from(["lru", "immediate", "cost_aware"]),
            "page_size": st.sampled_from([1, 8]),
            "max_num_seqs": st.sampled_from([3, 12]),
            "num_tokens": st.sampled_from([250, 900]),
            "host_adapter_bytes": st.sampled_from([None, 40_000]),
        }
    ),
)
def test_every_mixture_of_settings(seed: int, closed: bool, changes: dict) -> None:
    assert_same(make_system("slora", max_num_batched_tokens=100, disk_bandwidth=1e6, **changes), None, seed, closed)


def test_most_steps_are_fast_forwarded(monkeypatch) -> None:
    """So the tests above compare two different ways."""
    planned = 0

    class Counting(replica_module.SimulatedScheduler):
        def schedule(self, now):
            nonlocal planned
            planned += 1
            return super().schedule(now)

    monkeypatch.setattr(replica_module, "SimulatedScheduler", Counting)
    for name in ("slora", "slora-paper"):
        planned = 0
        result = simulate(
            random_workload(1, rate=10), make_system(name, **SYSTEMS[name]), SHAPE, device(), RANKS, sample_seconds=10
        )
        assert planned < result.counters.steps / 2, name
        assert serving_metrics(result.records).completed == 60


def test_the_workloads_above_queue_preempt_evict_and_abort() -> None:
    """So the tests above compare more than a quiet server."""
    ours, workload = make_system("slora", **SYSTEMS["slora"]), random_workload(1)
    aborting = simulate(workload, ours, SHAPE, device(), RANKS, policy=POLICIES["early_abort, code"])
    assert aborting.counters.aborts > 0
    result = simulate(workload, ours, SHAPE, device(), RANKS, sample_seconds=0.05)
    assert max(sample.waiting for sample in result.pool) > 5
    assert (
        result.counters.preemptions > 0 and result.counters.adapter_evictions > 0 and result.counters.copy_seconds > 0
    )


@pytest.mark.parametrize("fast", [True, False])
def test_tokens_are_the_requests_own_and_times_are_kept_beside_them(monkeypatch, fast) -> None:
    """Times as tokens would be cut to whole seconds in the keys of the prefix cache, and be equal in many requests."""
    requests = []

    class Kept(replica_module.SimulatedScheduler):
        def add(self, request):
            requests.append(request)
            super().add(request)

    monkeypatch.setattr(replica_module, "SimulatedScheduler", Kept)
    result = simulate(
        random_workload(1), make_system("slora", **SYSTEMS["slora"]), SHAPE, device(), RANKS, fast_forward=fast
    )
    times = {record.request_id: record.token_times for record in result.records}
    for request in requests:
        assert request.output == [int(request.id)] * request.max_new
        assert tuple(request.token_times) == times[request.id] and len(request.token_times) == request.max_new
