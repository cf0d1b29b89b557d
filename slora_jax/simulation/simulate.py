"""The simulation of a workload."""

from __future__ import annotations

from collections.abc import Sequence
from copy import deepcopy

from slora_jax.errors import ConfigError, RequestError
from slora_jax.metrics import PAGE_KINDS, PoolPages, PoolSample
from slora_jax.scheduling import Policy, make_policy
from slora_jax.simulation.arrivals import Arrivals
from slora_jax.simulation.cost import CostModel
from slora_jax.simulation.device import DeviceModel
from slora_jax.simulation.loading import Lane
from slora_jax.simulation.memory import pool_pages
from slora_jax.simulation.offline import simulate_offline
from slora_jax.simulation.request import SimulatedRequest, SimulationCounters, SimulationResult
from slora_jax.simulation.server import Server
from slora_jax.simulation.shape import ModelShape
from slora_jax.simulation.shard import shard_shape
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
    """Serves `workload`, in order of arrival but for what follows other requests (`SimulatedRequest.after`), to its
    last token. Deterministic.

    adapters: the rank of each. policy: instead of the system's; copied for every replica, so that it can be used again
    (an offline loop has none). sample_seconds: between samples of the pool, all replicas together. fast_forward=False
    runs every step by itself, with the same results.

    Raises:
      ConfigError: system, model and device do not fit together. RequestError: a request that can never run.
    """
    _check(workload, adapters)
    shape = shard_shape(model, system.tp, system.tp_lora)
    cost = CostModel(shape, device, system.software, system.lora, system.lora_collectives)
    if system.offline_batch is not None:
        return simulate_offline(workload, system, cost, adapters)
    num_tokens = system.pool_tokens(model, device)
    ranks = {str(i): rank for i, rank in enumerate(adapters)}
    counters = SimulationCounters()
    lane = Lane()
    servers = []
    for arrivals in _arrivals(workload, system, len(adapters)):
        own = deepcopy(policy) if policy is not None else make_policy(system.policy)
        fast = fast_forward and system.replicas == 1
        servers.append(Server(system, cost, num_tokens, ranks, lane, counters, own, workload, arrivals, fast))
    samples: list[PoolSample] = []
    next_sample = 0.0
    while working := [server for server in servers if server.has_work]:
        server = min(working, key=lambda server: server.next_turn)
        if server.next_turn >= next_sample:
            samples.append(_sample(servers, server.next_turn))
            next_sample = server.next_turn + sample_seconds
        server.step(next_sample)
    for server in servers:
        server.check()
    return _result(servers, counters, lane, samples)


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
                raise RequestError(f"workload[{number}].arrival={request.arrival!r}: must ascend from 0")
            last = request.arrival
        elif not 0 <= request.after < number:
            raise RequestError(f"workload[{number}].after={request.after!r}: must be the number of an earlier request")
        elif not request.arrival >= 0:
            raise RequestError(f"workload[{number}].arrival={request.arrival!r}: must be seconds from 0 after another")
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
    """At each replica.

    Raises:
      ConfigError: with merged weights in every replica, there are more adapters than replicas.
    """
    if system.replicas > 1 and num_adapters > system.replicas:
        raise ConfigError(
            f"system {system.name!r}: {num_adapters} adapters need as many replicas, not {system.replicas}"
        )
    replica_of = [(request.adapter or 0) % system.replicas for request in workload]
    return Arrivals.of_each(workload, replica_of, system.replicas)


def _sample(servers: Sequence[Server], now: float) -> PoolSample:
    pages = [pool_pages(server.residency) for server in servers]
    return PoolSample(
        time=now,
        pages=PoolPages(*(sum(getattr(p, kind) for p in pages) for kind in PAGE_KINDS)),
        running=sum(len(server.scheduler.running) for server in servers),
        waiting=sum(len(server.scheduler.waiting) for server in servers),
        uploading=round(sum(server.loading.bytes_in_flight(now) for server in servers)),
    )


def _result(
    servers: Sequence[Server], counters: SimulationCounters, lane: Lane, samples: Sequence[PoolSample]
) -> SimulationResult:
    records = {number: record for server in servers for number, record in server.records.items()}
    for server in servers:
        residency = server.residency.counters
        counters.loads += residency.loads
        counters.evictions += residency.evictions
        counters.hits += residency.hits
        counters.prefetch_hits += residency.prefetch_hits
        counters.prefetches_wasted += residency.wasted
        counters.prompt_tokens += server.scheduler.prompt_tokens
        if server.prefixes is not None:
            counters.prefix_hit_tokens += server.prefixes.counters.hits * server.prefixes.page_size
            counters.prefix_evictions += server.prefixes.counters.evictions
        counters.preemptions += server.scheduler.preemptions
        counters.aborts += server.scheduler.aborts
        counters.disk_reads += server.loading.store.reads
        counters.copy_seconds += server.loading.copies.busy
    counters.device_seconds = lane.busy
    ordered = [records[number] for number in sorted(records)]
    return SimulationResult(
        records=ordered,
        pool=samples,
        counters=counters,
        seconds=max(record.finished for record in ordered),
        abort_reasons={name: reason for server in servers for name, reason in server.abort_reasons.items()},
    )
