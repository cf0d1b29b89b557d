"""One simulated replica: the engine's core on a virtual clock, with its arriving requests."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import replace

from slora_jax.engine.arrival import check_fits
from slora_jax.engine.core import EngineCore, Update
from slora_jax.errors import ConfigError
from slora_jax.memory import PageKind, PrefixCache
from slora_jax.metrics import Counters, RequestRecord
from slora_jax.scheduling import AdapterUse, FinishReason, Policy, Request, RequestMetrics, SamplingParams
from slora_jax.simulation.arrivals import Arrivals
from slora_jax.simulation.cost import CostModel
from slora_jax.simulation.executor import SimulatedExecutor, SimulatedStep, VirtualClock
from slora_jax.simulation.fast_forward import fast_forward
from slora_jax.simulation.loading import HostStore, Lane, Loading
from slora_jax.simulation.memory import make_residency
from slora_jax.simulation.request import SimulatedRequest
from slora_jax.simulation.scheduler import SimulatedScheduler
from slora_jax.simulation.system import SystemConfig

GREEDY = SamplingParams(ignore_eos=True)


class Replica:
    """An `EngineCore` with a `SimulatedExecutor`.

    Attributes:
      clock: the host's clock.
      records: records of ended requests, by number in the workload.
      abort_reasons: by request id.
    """

    def __init__(
        self,
        system: SystemConfig,
        cost: CostModel,
        num_tokens: int,
        ranks: dict[str, int],
        device: Lane,
        counters: Counters,
        policy: Policy,
        workload: Sequence[SimulatedRequest],
        arrivals: Arrivals,
        fast: bool,
    ) -> None:
        """Sets up the replica.

        Args:
          num_tokens: capacity of the pool.
          ranks: by adapter digest.
          device: device lane, shared by all replicas.
          counters: shared by all replicas.
          workload: requests of all replicas.
          arrivals: this replica's part of the workload.
          fast: allows `fast_forward`.
        """
        shape = cost.shape
        self.clock = VirtualClock()
        self.records: dict[int, RequestRecord] = {}
        self.abort_reasons: dict[str, str] = {}
        self._system, self._fast = system, fast
        self._workload, self._arrivals = workload, arrivals
        self._arrived = 0
        pages = {digest: shape.adapter_pages(rank, system.page_size) for digest, rank in ranks.items()}
        self._uses = {
            digest: AdapterUse(digest, digest, shape.ranks(rank), pages[digest]) for digest, rank in ranks.items()
        }
        residency = make_residency(system, num_tokens, cost, counters)
        capacity = residency.evictor.allocator.capacity_for(PageKind.ADAPTER)
        if system.serves_adapters and max(pages.values(), default=0) > capacity:
            raise ConfigError(
                f"system {system.name!r}: an adapter of {max(pages.values())} pages does not "
                f"fit into the {capacity} available to adapters; raise adapter_tokens or num_tokens"
            )
        whole = {digest: rank * shape.whole.lora_bytes for digest, rank in ranks.items()}
        store = HostStore(whole, system.host_adapter_bytes, system.disk_bandwidth)
        loading = Loading(store, cost, {digest: rank * shape.lora_bytes for digest, rank in ranks.items()})
        self.executor = SimulatedExecutor(system, cost, ranks, loading, residency, device, self.clock, arrivals)
        prefixes = PrefixCache(residency.evictor, system.page_size) if system.prefix_cache else None
        system = replace(system, max_num_batched_tokens=system.step_tokens(num_tokens))
        self.scheduler = SimulatedScheduler(residency, policy, system, self.executor, prefixes)
        self.core: EngineCore[SimulatedStep] = EngineCore(
            self.scheduler, self.executor, self.clock, overlap=system.overlap
        )

    @property
    def has_work(self) -> bool:
        """Returns whether requests are running, waiting, or still to arrive."""
        return bool(self._arrivals) or self.core.has_work

    @property
    def next_turn(self) -> float:
        """Time of the next step: now, or the next arrival if the core is idle."""
        return self.clock.now if self.core.has_work else max(self.clock.now, self._arrivals.next)

    def step(self, until: float = math.inf) -> None:
        """Runs one step of the core, or fast-forwards up to `until`, and advances the clock."""
        self.clock.now = self.next_turn
        self.deliver()
        if self._fast and fast_forward(self, until):
            return
        self.end_updates(self.core.step())

    def deliver(self) -> None:
        """Queues the requests that have arrived."""
        for number, arrival in self._arrivals.until(self.clock.now):
            self.core.add(self._request(number, arrival))
            self._arrived += 1

    def end(self, requests: Iterable[Request]) -> None:
        """Ends requests that have generated all their tokens."""
        for request in requests:
            self.core.finish(request, FinishReason.LENGTH)
            self._record(request)

    def end_updates(self, updates: Iterable[Update[SimulatedStep]]) -> None:
        """Records the requests that ended in these updates."""
        for update in updates:
            if update.ended:
                if update.error is not None:
                    self.abort_reasons[update.request.id] = update.error
                self._record(update.request)

    def _request(self, number: int, arrival: float) -> Request:
        simulated = self._workload[number]
        uses_adapter = simulated.adapter is not None and self._system.serves_adapters
        use = self._uses[str(simulated.adapter)] if uses_adapter else None
        check_fits(
            simulated.prompt_tokens, simulated.output_tokens, self._system.page_size, use, self.scheduler.allocator
        )
        return Request(
            id=str(number),
            number=self._arrived,
            prompt=simulated.prompt(number),
            params=GREEDY,
            seed=0,
            max_new=simulated.output_tokens,
            adapter=use,
            metrics=RequestMetrics(arrival=arrival),
            tenant=simulated.tenant,
        )

    def _record(self, request: Request) -> None:
        metrics = request.metrics
        assert metrics.finished is not None and request.finish_reason is not None
        number = int(request.id)
        self._arrivals.ended(number, metrics.finished)
        self.records[number] = RequestRecord(
            request_id=request.id,
            adapter=None if request.adapter is None else request.adapter.name,
            prompt_tokens=len(request.prompt),
            output_tokens=len(request.output),
            finish_reason=request.finish_reason,
            arrival=metrics.arrival,
            finished=metrics.finished,
            admitted=metrics.admitted,
            first_token=metrics.first_token,
            token_times=tuple(request.token_times),
        )
