"""One simulated replica: the engine's loop over a scheduler, on a virtual clock."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import cast

from slora_jax.engine.arrival import check_fits
from slora_jax.errors import ConfigError, RequestError
from slora_jax.memory import PageKind, PrefixCache, Resident
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
from slora_jax.simulation.arrivals import Arrivals
from slora_jax.simulation.cost import CostModel
from slora_jax.simulation.fast_forward import fast_forward
from slora_jax.simulation.loading import HostStore, Lane, Loading
from slora_jax.simulation.memory import make_residency
from slora_jax.simulation.request import SimulatedRequest, SimulationCounters
from slora_jax.simulation.system import SystemConfig
from slora_jax.simulation.work import StepWork, step_work

GREEDY = SamplingParams(ignore_eos=True)


@dataclass(slots=True)
class InFlight:
    """A step on the device. ended: seconds; its tokens are known then. sequences: none in the midst of a fast forward,
    which reads its steps itself."""

    sequences: Sequence[ScheduledSequence]
    ended: float


class Server:
    """Owns a scheduler, its memory and the host's clock `now`; the device lane may be shared with other replicas.

    The loop is `Engine.step`'s: deliver what arrived, note the uploads that landed, plan, begin the plan's uploads,
    dispatch, and read the tokens of the step before (or, if host and device take turns, of this very step).
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
        workload: Sequence[SimulatedRequest],
        arrivals: Arrivals,
        fast: bool,
    ) -> None:
        """ranks: by adapter digest. workload: of all replicas. arrivals: of it, at this one. fast: may
        `fast_forward`."""
        shape = cost.shape
        self.now = 0.0
        self.records: dict[int, RequestRecord] = {}
        self.abort_reasons: dict[str, str] = {}
        self.cost, self.ranks = cost, ranks
        self._system, self._fast = system, fast
        self._device, self._counters = device, counters
        pages = {digest: shape.adapter_pages(rank, system.page_size) for digest, rank in ranks.items()}
        nbytes = {digest: rank * shape.lora_bytes for digest, rank in ranks.items()}
        self._nbytes = nbytes
        self._uses = {
            digest: AdapterUse(digest, digest, shape.ranks(rank), pages[digest]) for digest, rank in ranks.items()
        }
        self.residency = make_residency(system, num_tokens, cost)
        most = self.residency.evictor.allocator.capacity_for(PageKind.ADAPTER)
        if system.serves_adapters and max(pages.values(), default=0) > most:
            raise ConfigError(
                f"system {system.name!r}: an adapter of {max(pages.values())} pages does not "
                f"fit into the {most} that adapters can have; raise adapter_tokens or num_tokens"
            )
        whole = {digest: rank * shape.whole.lora_bytes for digest, rank in ranks.items()}
        store = HostStore(whole, system.host_bytes, system.disk_bandwidth)
        self.loading = Loading(store, cost, nbytes)
        limits = SchedulerLimits(
            max_seqs=system.max_seqs,
            max_tokens=system.step_tokens(num_tokens),
            page_size=system.page_size,
            admission=system.admission,
            prefetch=system.prefetch,
            upload_pages=system.upload_pages,
            admit_every=system.admit_every,
            mixed=system.mixed,
        )
        self.prefixes = PrefixCache(self.residency.evictor, system.page_size) if system.prefix_cache else None
        self.scheduler = Scheduler(
            self.residency, policy, limits, lambda digest: self.loading.state(digest, self.now), self.prefixes
        )
        self._workload, self._arrivals = workload, arrivals
        self._arrived = 0
        self._in_flight: InFlight | None = None
        self._last_end = 0.0  # of this replica's last step, in whose launches others may have the device
        self._merged: str | None = None
        self._landed = False  # an adapter, since the last step

    @property
    def has_work(self) -> bool:
        return bool(self._arrivals) or self.scheduler.has_work() or self._in_flight is not None

    @property
    def next_turn(self) -> float:
        """When the loop goes on: now, or with the next arrival if nothing is to do."""
        if self.scheduler.has_work() or self._in_flight is not None:
            return self.now
        return max(self.now, self._arrivals.next)

    def step(self, until: float = math.inf) -> None:
        """One turn of the loop, or as many as can be run at once before `until`; `now` advances."""
        self.now = self.next_turn
        self.deliver()
        if self._fast and fast_forward(self, until):
            return
        self._land()
        plan = self.scheduler.schedule(self.now)
        self.loading.stage(plan.uploads, self.now)
        for request, reason in plan.aborted:
            self.abort_reasons[request.id] = reason
            self._record(request)
        before, self._in_flight = self._in_flight, self._dispatch(plan) if plan.sequences else None
        if not self._system.overlap:
            before, self._in_flight = self._in_flight, None
        if before is not None:
            self._read(before)
        elif self._in_flight is None and self.scheduler.has_work():
            self._wait()

    def awaits_admission(self) -> bool:
        """Whether the next step may admit, or look ahead. Without anyone who waits, uploads in flight are of adapters
        that were given up, and change nothing when they land."""
        limits = self.scheduler.limits
        return bool(self.scheduler.waiting) and (self.scheduler.admission_due or limits.prefetch > 0)

    def run_decode(self, work: StepWork) -> float | None:
        """For `fast_forward`: runs a step of `work`, in which everyone decodes, and reads the step before, or this one
        if host and device take turns. Returns when a fast-forwarded step's tokens were read, if it was one."""
        before, self._in_flight = self._in_flight, self._launch(work, 0.0, ())
        if not self._system.overlap:
            before, self._in_flight = self._in_flight, None
        if before is None:
            return None
        if before.sequences:
            self._read(before)
            return None
        self.now = max(self.now, before.ended)
        return self.now

    def leave_in_flight(self, sequences: Sequence[ScheduledSequence]) -> None:
        """For `fast_forward`, at its end: the sequences of its last step, if that is not read yet."""
        if self._in_flight is not None:
            self._in_flight.sequences = sequences

    def end(self, requests: Sequence[Request]) -> None:
        """Ends requests that have all of their tokens."""
        for request in requests:
            self.scheduler.finish(request, FinishReason.LENGTH, self.now)
            self._record(request)

    def check(self) -> None:
        """Raises `PoolError` on any leak of pages."""
        self.scheduler.check()

    def deliver(self) -> None:
        """Queues what has arrived by now."""
        for number, arrival in self._arrivals.until(self.now):
            self.scheduler.add(self._request(number, arrival))
            self._arrived += 1

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

    def _land(self) -> None:
        """Notes what has arrived."""
        for upload in self.loading.landed(self.now):
            self.residency.land(upload)
            self._landed |= upload.resident.present and upload.resident.has_landed

    def _dispatch(self, plan: StepPlan) -> InFlight:
        work = step_work(plan.sequences, self.ranks)
        return self._launch(work, self._changes(plan), plan.loads, plan.sequences)

    def _launch(
        self, work: StepWork, changes: float, loads: Sequence[Resident], sequences: Sequence[ScheduledSequence] = ()
    ) -> InFlight:
        """The host's part, the wait for `loads`, and `changes` seconds before the step on the device."""
        counters = self._counters
        host = self.cost.host_seconds(work)
        self.now += host
        ready = max(self.now, self._device.free, self._last_end)
        start = max(ready, self.loading.load(loads, self.now))
        self._device.take(start, self.cost.busy_seconds(work) + changes)
        self._last_end = start + self.cost.step_seconds(work) + changes
        counters.host_seconds += host
        counters.stall_seconds += start - ready
        counters.steps += 1
        counters.tokens_computed += work.rows
        return InFlight(sequences, self._last_end)

    def _changes(self, plan: StepPlan) -> float:
        """Seconds on the device before the step proper: merging, or gathering adapters anew."""
        landed, self._landed = self._landed, False
        if self._system.merged:
            return self._switch(plan.sequences[0].request.digest)
        if self._system.gathers_on_load and (plan.loads or landed):
            return self.cost.move_seconds(sum(self._nbytes[r.digest] for r in self.residency.residents))
        return 0.0

    def _switch(self, digest: str | None) -> float:
        if digest == self._merged:
            return 0.0
        changed = [self.ranks[name] for name in (self._merged, digest) if name is not None]
        self._merged = digest
        self._counters.switches += 1
        return sum(self.cost.merge_seconds(rank) for rank in changed)

    def _read(self, step: InFlight) -> None:
        """Waits for a step, hands out its tokens, and ends who has all of them."""
        self.now = now = max(self.now, step.ended)
        token = cast(int, now)
        ended = []
        for sequence in step.sequences:
            request = sequence.request
            if not sequence.samples or request.finish_reason is not None:
                continue
            output = request.output
            output.append(token)
            if len(output) == 1:
                request.metrics.first_token = now
            if len(output) >= request.max_new:
                ended.append(request)
        self.end(ended)

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
            token_times=tuple(request.output),
        )

    def _wait(self) -> None:
        """Nothing can run: until something arrives, from a user or from disk or over the copy lane. With a copy under
        way the device stalls for it."""
        event = min(self._arrivals.next, self.loading.next_event(self.now))
        if event == math.inf:
            raise RequestError(f"{len(self.scheduler.waiting)} requests wait, and nothing will ever let them run")
        if self.loading.next_landing(self.now) < math.inf:
            self._counters.stall_seconds += event - self.now
        self.now = event
