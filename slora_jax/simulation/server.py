"""One simulated replica: the engine's loop over a scheduler, on a virtual clock."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from slora_jax.errors import RequestError
from slora_jax.metrics import RequestRecord
from slora_jax.scheduling import (
    AdapterUse,
    FinishReason,
    Policy,
    Request,
    RequestMetrics,
    SamplingParams,
    ScheduledSequence,
    Scheduler,
    SchedulerLimits,
    StepPlan,
)
from slora_jax.simulation.cost import CostModel
from slora_jax.simulation.loading import HostStore, Lane, Loading, Prefetching
from slora_jax.simulation.memory import SimulatedMemory
from slora_jax.simulation.request import SimulatedRequest, SimulationCounters
from slora_jax.simulation.system import SystemConfig
from slora_jax.simulation.work import StepWork, step_work

GREEDY = SamplingParams(ignore_eos=True)


@dataclass(slots=True)
class InFlight:
    """A step on the device. ended: seconds; its tokens are known then."""

    sequences: Sequence[ScheduledSequence]
    ended: float


class Server:
    """Owns a scheduler, its memory and the host's clock `now`; the device lane may be shared with other replicas.

    The loop is `Engine.step`'s: deliver what arrived, plan, dispatch, and read the tokens of the step before (or, if
    host and device take turns, of this very step).
    """

    def __init__(
        self,
        system: SystemConfig,
        cost: CostModel,
        num_tokens: int,
        ranks: dict[str, int],
        device: Lane,
        counters: SimulationCounters,
        policy: Policy,
        requests: Sequence[tuple[int, SimulatedRequest]],
    ) -> None:
        """ranks: by adapter digest. requests: with their numbers, in order of arrival."""
        shape = cost.shape
        self.now = 0.0
        self.records: dict[int, RequestRecord] = {}
        self.abort_reasons: dict[str, str] = {}
        self._system, self._cost, self._ranks = system, cost, ranks
        self._device, self._counters = device, counters
        pages = {digest: shape.adapter_pages(rank, system.page_size) for digest, rank in ranks.items()}
        nbytes = {digest: rank * shape.lora_bytes for digest, rank in ranks.items()}
        self._nbytes = nbytes
        self._uses = {
            digest: AdapterUse(digest, digest, shape.ranks(rank), pages[digest]) for digest, rank in ranks.items()
        }
        self.memory = SimulatedMemory(system, num_tokens, pages)
        store = HostStore(nbytes, system.host_bytes, system.disk_bandwidth)
        self.loading = (Prefetching if system.prefetch else Loading)(store, cost, nbytes)
        limits = SchedulerLimits(
            max_seqs=system.max_seqs,
            max_tokens=system.step_tokens(num_tokens),
            page_size=system.page_size,
            admission=system.admission,
            admit_every=system.admit_every,
            mixed=system.mixed,
        )
        self.scheduler = Scheduler(
            self.memory.allocator,
            self.memory.residency,
            policy,
            limits,
            lambda digest: self.loading.state(digest, self.now),
        )
        self._arrivals = deque((number, request) for number, request in requests)
        self._in_flight: InFlight | None = None
        self._token_times: dict[int, list[float]] = {}
        self._merged: str | None = None

    @property
    def has_work(self) -> bool:
        return bool(self._arrivals) or self.scheduler.has_work() or self._in_flight is not None

    def step(self) -> None:
        """One turn of the loop; `now` advances."""
        if not self.scheduler.has_work() and self._in_flight is None:
            self.now = max(self.now, self._arrivals[0][1].arrival)
        self._deliver()
        plan = self.scheduler.schedule(self.now)
        for request, reason in plan.aborted:
            self.abort_reasons[request.id] = reason
            self._record(request)
        if self._system.prefetch and self.scheduler.waiting:
            self._prefetch()
        before, self._in_flight = self._in_flight, self._dispatch(plan) if plan.sequences else None
        if not self._system.overlap:
            before, self._in_flight = self._in_flight, None
        if before is not None:
            self.now = max(self.now, before.ended)
            self._read(before)
        elif self._in_flight is None and self.scheduler.has_work():
            self._wait()

    def check(self) -> None:
        """Raises `PoolError` on any leak of pages."""
        self.memory.check([np.asarray(request.pages, np.int32) for request in self.scheduler.running])

    def _deliver(self) -> None:
        while self._arrivals and self._arrivals[0][1].arrival <= self.now:
            number, simulated = self._arrivals.popleft()
            self.scheduler.add(self._request(number, simulated))

    def _request(self, number: int, simulated: SimulatedRequest) -> Request:
        uses_adapter = simulated.adapter is not None and self._system.serves_adapters
        use = self._uses[str(simulated.adapter)] if uses_adapter else None
        limits, allocator = self.scheduler.limits, self.memory.allocator
        needed = -(-(simulated.prompt_tokens + simulated.output_tokens - 1) // limits.page_size)
        needed += 0 if use is None or self.memory.is_split else use.num_pages
        if needed > allocator.capacity:
            raise RequestError(f"request {number}: {needed} pages of the pool's {allocator.capacity} with its adapter")
        return Request(
            id=str(number),
            number=number,
            prompt=[0] * simulated.prompt_tokens,
            params=GREEDY,
            seed=0,
            max_new=simulated.output_tokens,
            adapter=use,
            metrics=RequestMetrics(arrival=simulated.arrival),
            tenant=simulated.tenant,
        )

    def _prefetch(self) -> None:
        scheduler = self.scheduler
        waiting = (
            request
            for request in scheduler.policy.order(scheduler.waiting, self.now)
            if request.digest is not None and request.digest not in scheduler.residency
        )
        self.loading.ahead(waiting, self.now)

    def _dispatch(self, plan: StepPlan) -> InFlight:
        work = step_work(plan.sequences, self._ranks)
        host = self._cost.host_seconds(work)
        self._counters.host_seconds += host
        self.now += host
        ready = max(self.now, self._device.free)
        landed = max(ready, self.loading.landed(plan.loads, self.now))
        self._counters.stall_seconds += landed - ready
        seconds = self._cost.step_seconds(work) + self._changes(plan)
        self._count(work)
        return InFlight(plan.sequences, self._device.take(landed, seconds))

    def _count(self, work: StepWork) -> None:
        self._counters.steps += 1
        self._counters.tokens_computed += work.rows

    def _changes(self, plan: StepPlan) -> float:
        """Seconds on the device before the step proper: merging, or gathering adapters anew."""
        if self._system.merged:
            return self._switch(plan.sequences[0].request.digest)
        if self._system.gathers_on_load and plan.loads:
            return self._cost.move_seconds(sum(self._nbytes[r.digest] for r in self.memory.residency.residents))
        return 0.0

    def _switch(self, digest: str | None) -> float:
        if digest == self._merged:
            return 0.0
        changed = [self._ranks[name] for name in (self._merged, digest) if name is not None]
        self._merged = digest
        self._counters.switches += 1
        return sum(self._cost.merge_seconds(rank) for rank in changed)

    def _read(self, step: InFlight) -> None:
        """Hands out a step's tokens; ends who has all of them."""
        ended = False
        now = self.now
        for sequence in step.sequences:
            request = sequence.request
            if not sequence.samples or request.finish_reason is not None:
                continue
            output = request.output
            output.append(0)
            if len(output) == 1:
                request.metrics.first_token = now
                self._token_times[request.number] = []
            self._token_times[request.number].append(now)
            if len(output) >= request.max_new:
                self.scheduler.finish(request, FinishReason.LENGTH, now)
                self._record(request)
                ended = True
        if ended:
            self.memory.requests_ended()

    def _record(self, request: Request) -> None:
        metrics = request.metrics
        assert metrics.finished is not None and request.finish_reason is not None
        self.records[request.number] = RequestRecord(
            request_id=request.id,
            adapter=None if request.adapter is None else request.adapter.name,
            prompt_tokens=len(request.prompt),
            output_tokens=len(request.output),
            finish_reason=request.finish_reason,
            arrival=metrics.arrival,
            finished=metrics.finished,
            admitted=metrics.admitted,
            first_token=metrics.first_token,
            token_times=tuple(self._token_times.pop(request.number, ())),
        )

    def _wait(self) -> None:
        """Nothing can run: until something arrives, from a user or from disk or over the copy lane."""
        events = [self._arrivals[0][1].arrival] if self._arrivals else []
        landing = self.loading.next_event()
        if landing is not None:
            events.append(landing)
        later = [event for event in events if event > self.now]
        if not later:
            raise RequestError(f"{len(self.scheduler.waiting)} requests wait, and nothing will ever let them run")
        self.now = min(later)
