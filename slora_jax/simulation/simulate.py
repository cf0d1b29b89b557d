"""Simulates a workload."""

from __future__ import annotations

from collections.abc import Sequence
from copy import deepcopy

from slora_jax.errors import ConfigError, RequestError
from slora_jax.memory import pool_pages
from slora_jax.metrics import PAGE_KINDS, Counters, PoolPages, PoolSample
from slora_jax.scheduling import Policy, make_policy
from slora_jax.simulation.arrivals import Arrivals
from slora_jax.simulation.cost import CostModel
from slora_jax.simulation.device import DeviceModel
from slora_jax.simulation.loading import Lane
from slora_jax.simulation.offline import simulate_offline
from slora_jax.simulation.replica import Replica
from slora_jax.simulation.request import SimulatedRequest, SimulationResult
from slora_jax.simulation.shape import ModelShape
from slora_jax.simulation.system import SystemConfig


def simulate(
    workload: Sequence[SimulatedRequest],
    system: SystemConfig,
    model: ModelShape,
    device: DeviceModel,
    adapters: Sequence[int],
    *,
    policy: Policy | None = None,
    sample_seconds: float = 1.0,
    fast_forward: bool = True,
) -> SimulationResult:
    """Serves `workload` to its last token. Deterministic.

    Args:
      workload: requests sorted by arrival, except those with `SimulatedRequest.after`.
      adapters: rank of each adapter.
      policy: replaces the system's policy; it is copied for every replica, so the caller can reuse it. Ignored by the
        offline loop.
      sample_seconds: interval between samples of the pool, summed over replicas.
      fast_forward: False runs every step separately, with the same results.

    Raises:
      ConfigError: system, model and device do not fit together.
      RequestError: a request can never run.
    """
    _check(workload, adapters)
    shape = system.shard_of(model)
    cost = CostModel(shape, device, system.software, system.lora, system.lora_collectives)
    if system.offline_batch is not None:
        return simulate_offline(workload, system, cost, adapters)
    num_tokens = system.pool_tokens(model, device)
    ranks = {str(i): rank for i, rank in enumerate(adapters)}
    counters = Counters()
    lane = Lane()
    replicas = []
    for arrivals in _arrivals(workload, system, len(adapters)):
        own = deepcopy(policy) if policy is not None else make_policy(system.policy)
        fast = fast_forward and system.replicas == 1
        replicas.append(Replica(system, cost, num_tokens, ranks, lane, counters, own, workload, arrivals, fast))
    samples: list[PoolSample] = []
    next_sample = 0.0
    while working := [replica for replica in replicas if replica.has_work]:
        replica = min(working, key=lambda replica: replica.next_turn)
        if replica.next_turn >= next_sample:
            samples.append(_sample(replicas, replica.next_turn))
            next_sample = replica.next_turn + sample_seconds
        replica.step(next_sample)
    for replica in replicas:
        replica.core.check()
        counters.disk_reads += replica.executor.loading.store.reads
        counters.copy_seconds += replica.executor.loading.copies.busy
    counters.device_seconds = lane.busy
    records = {number: record for replica in replicas for number, record in replica.records.items()}
    ordered = [records[number] for number in sorted(records)]
    return SimulationResult(
        records=ordered,
        pool=samples,
        counters=counters,
        seconds=max(record.finished for record in ordered),
        abort_reasons={name: reason for replica in replicas for name, reason in replica.abort_reasons.items()},
    )


def _check(workload: Sequence[SimulatedRequest], adapters: Sequence[int]) -> None:
    if not workload:
        raise RequestError("workload: there are no requests")
    for index, rank in enumerate(adapters):
        if not isinstance(rank, int) or isinstance(rank, bool) or rank < 1:
            raise ConfigError(f"adapters[{index}]={rank!r}: must be a rank, a positive integer")
    last = 0.0
    for number, request in enumerate(workload):
        if request.after is None:
            if not request.arrival >= last:
                raise RequestError(f"workload[{number}].arrival={request.arrival!r}: must be at least {last}")
            last = request.arrival
        elif not 0 <= request.after < number:
            raise RequestError(f"workload[{number}].after={request.after!r}: must be the number of an earlier request")
        elif not request.arrival >= 0:
            raise RequestError(f"workload[{number}].arrival={request.arrival!r}: must be at least 0 seconds")
        if request.adapter is not None and not 0 <= request.adapter < len(adapters):
            raise RequestError(f"workload[{number}].adapter={request.adapter!r}: there are {len(adapters)} adapters")
        if request.prompt_tokens < 1 or request.output_tokens < 1:
            raise RequestError(
                f"workload[{number}]: prompt_tokens={request.prompt_tokens}, output_tokens={request.output_tokens}: "
                "must be at least 1"
            )
        if request.prefix is not None and not 0 < request.prefix[1] <= request.prompt_tokens:
            raise RequestError(
                f"workload[{number}].prefix={request.prefix!r}: must share 1 to {request.prompt_tokens} prompt tokens"
            )


def _arrivals(workload: Sequence[SimulatedRequest], system: SystemConfig, num_adapters: int) -> list[Arrivals]:
    """The arrivals at each replica.

    Raises:
      ConfigError: there are several replicas, each with one merged adapter, and more adapters than replicas.
    """
    if system.replicas > 1 and num_adapters > system.replicas:
        raise ConfigError(
            f"system {system.name!r}: {num_adapters} adapters need as many replicas, not {system.replicas}"
        )
    replica_of = [(request.adapter or 0) % system.replicas for request in workload]
    return Arrivals.of_each(workload, replica_of, system.replicas)


def _sample(replicas: Sequence[Replica], now: float) -> PoolSample:
    pages = [pool_pages(replica.scheduler.residency) for replica in replicas]
    return PoolSample(
        time=now,
        pages=PoolPages(*(sum(getattr(p, kind) for p in pages) for kind in PAGE_KINDS)),
        running=sum(len(replica.scheduler.running) for replica in replicas),
        waiting=sum(len(replica.scheduler.waiting) for replica in replicas),
        uploading=round(sum(replica.executor.loading.bytes_in_flight(now) for replica in replicas)),
    )
