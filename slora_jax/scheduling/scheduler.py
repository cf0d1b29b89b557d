"""Continuous batching over the unified pool: admission, chunked prefill, preemption by recomputation."""

from __future__ import annotations

from bisect import insort
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import Enum

import numpy as np

from slora_jax.errors import ConfigError, RequestError
from slora_jax.memory import AdapterResidency, PageKind
from slora_jax.scheduling.plan import ScheduledSequence, StepPlan
from slora_jax.scheduling.policy import Batch, Policy
from slora_jax.scheduling.queue import RequestQueue, by_number, remove_sorted
from slora_jax.scheduling.request import FinishReason, Request, Status
from slora_jax.scheduling.reservation import Reservation

ADMISSIONS = ("optimistic", "reserve")


class AdapterState(Enum):
    """Where an adapter's tiles are on the host."""

    READY = "ready"
    LOADING = "loading"
    FAILED = "failed"


@dataclass(frozen=True)
class SchedulerLimits:
    """max_seqs: sequences running at once. max_tokens: rows of one step. page_size: tokens of a page.
    admission: "optimistic" admits what fits now; "reserve" what fits with all output it may still have (`Reservation`,
    the paper's).
    admit_every: 1 tries to admit (and asks for the policy's aborts) in every step; n > 1 lets n steps decode after an
    admission, then tries in every step until one admits, and whenever nothing runs. The paper's code has 10.
    mixed: prefill and decode share steps, prompts in chunks. False, as in the paper's code: admitted requests prefill
    in a step of their own, whole, while the others pause; max_tokens then bounds the prompts of one admission."""

    max_seqs: int
    max_tokens: int
    page_size: int
    admission: str = "optimistic"
    admit_every: int = 1
    mixed: bool = True

    def __post_init__(self) -> None:
        if self.admission not in ADMISSIONS:
            raise ConfigError(f"SchedulerLimits.admission={self.admission!r}: must be one of {ADMISSIONS}")
        every = self.admit_every
        if not isinstance(every, int) or isinstance(every, bool) or every < 1:
            raise ConfigError(f"SchedulerLimits.admit_every={every!r}: must be an integer of at least 1")


class Scheduler:
    """Owns the queues. Every step: the policy's aborts; then running sequences (one token each, or their next prefill
    chunk); then as many waiting requests as the policy's selection, the pages, the slots and the token budget allow.

    Admission needs pages for all tokens known so far, and for the adapter if it is not resident; under "reserve" for
    all tokens to come as well. When a running sequence needs a page and none is free, what is idle goes first; then the
    policy's last running request is preempted: its pages are freed and its tokens recomputed when it is admitted again.
    """

    def __init__(
        self,
        residency: AdapterResidency,
        policy: Policy,
        limits: SchedulerLimits,
        adapter_state: Callable[[str], AdapterState] = lambda digest: AdapterState.READY,
    ) -> None:
        self.residency = residency
        self.evictor = residency.evictor
        self.allocator = residency.evictor.allocator
        self.policy = policy
        self.limits = limits
        self.waiting = RequestQueue()
        self.running: list[Request] = []  # in order of arrival
        self.preemptions = 0
        self.aborts = 0
        self._adapter_state = adapter_state
        self._adapters: dict[str, int] = {}  # digest -> running requests
        self._batch = Batch(self.running, self._adapters)
        self._free_slots = list(range(limits.max_seqs - 1, -1, -1))
        self._decoded = 0  # steps since the last admission

    def add(self, request: Request) -> None:
        """Queues a request that fits into the pool alone.

        Raises:
          RequestError: prompts run whole (`mixed=False`), and with its output, as after a preemption, this one never
            would.
        """
        longest = len(request.prompt) + request.max_new - 1
        if not self.limits.mixed and longest > self.limits.max_tokens:
            raise RequestError(
                f"request {request.id!r}: its {longest} tokens of prompt and output may have to be prefilled in one "
                f"step, which has at most max_tokens={self.limits.max_tokens}; raise that, or set mixed=True"
            )
        self.policy.arrived(request, self.waiting)
        self.waiting.add(request)

    def has_work(self) -> bool:
        return bool(self.waiting or self.running)

    def pages_for(self, num_tokens: int) -> int:
        return -(-num_tokens // self.limits.page_size)

    def schedule(self, now: float) -> StepPlan:
        """Plans the next step and commits to it: pages are taken, progress counters advance."""
        plan = StepPlan()
        due = self.admission_due
        if due:
            self._abort(plan, now)
        if self.limits.mixed:
            self._extend_running(plan, now)
        admitted = due and not plan.preempted and self._admit(plan, now)
        if not self.limits.mixed and not admitted:
            self._extend_running(plan, now)
        self._decoded = 0 if admitted else self._decoded + 1
        self.policy.stepped(plan.sequences)
        return plan

    def schedule_decode(self, sequences: Sequence[ScheduledSequence], now: float) -> None:
        """As `schedule` in a step that admits nobody, as nobody waits or admission is not due, and gives each running
        sequence its next token: tells the policy and counts the step. The caller, a simulation of many such steps at
        once, brings the requests up to date."""
        if self.admission_due:
            self._abort(StepPlan(), now)
        self._decoded += 1
        self.policy.stepped(sequences)

    def finish(self, request: Request, reason: FinishReason, now: float) -> None:
        """Ends a request in any state and frees what it holds. A no-op on a finished one."""
        if request.status is Status.FINISHED:
            return
        if request.status is Status.WAITING:
            self.waiting.remove(request)
        else:
            remove_sorted(self.running, request)
            self._release(request)
        request.status = Status.FINISHED
        request.finish_reason = reason
        request.metrics.finished = now

    def check(self) -> None:
        """Compares page ownership with the allocator's books; raises `PoolError` on any leak."""
        self.allocator.check_owned(
            {
                PageKind.KV: [np.asarray(r.pages, np.int32) for r in self.running],
                PageKind.ADAPTER: [r.pages for r in self.residency.residents],
            }
        )

    @property
    def admission_due(self) -> bool:
        """Whether the next step tries to admit."""
        return self.limits.admit_every == 1 or self._decoded >= self.limits.admit_every or not self.running

    def _abort(self, plan: StepPlan, now: float) -> None:
        for request, reason in list(self.policy.aborts(self.waiting, self._batch, now)):
            if request.status is Status.WAITING and not request.num_sampled:
                self.finish(request, FinishReason.ABORT, now)
                plan.aborted.append((request, reason))
                self.aborts += 1

    def _extend_running(self, plan: StepPlan, now: float) -> None:
        """Written for a thousand sequences in well under a millisecond: no call per sequence that only decodes."""
        order = list(self.policy.order(self.running, now))
        last = len(order)  # order[last:] is preempted
        budget, page_size, sequences = self.limits.max_tokens, self.limits.page_size, plan.sequences
        growing: list[tuple[Request, int]] = []  # and the pages that each gets at the end
        taken, free = 0, self.allocator.available(PageKind.KV)
        for position, request in enumerate(order):
            if budget == 0 or position >= last:
                break
            sampled = request.num_sampled
            if sampled >= request.max_new:
                continue  # its last token is in flight
            start = request.num_computed
            known = len(request.prompt) + sampled
            end = min(known, start + budget)
            if end > len(request.pages) * page_size:
                needed = -(-end // page_size) - len(request.pages)
                if taken + needed > free:
                    while not self.evictor.make_room(taken + needed, PageKind.KV) and last > position:
                        last -= 1
                        self._preempt(order[last])
                        plan.preempted += 1
                    if position >= last:
                        break
                    free = self.allocator.available(PageKind.KV)
                growing.append((request, needed))
                taken += needed
            request.num_computed = end
            if end == known:
                request.num_sampled = sampled + 1
            sequences.append(ScheduledSequence(request, start, end - start, end == known))
            budget -= end - start
        plan.num_tokens = self.limits.max_tokens - budget
        pages = self.allocator.allocate(taken, PageKind.KV).tolist()
        for request, needed in growing:
            taken -= needed
            request.pages += pages[taken : taken + needed]

    def _admit(self, plan: StepPlan, now: float) -> bool:
        """Whether anyone was admitted."""
        if not self.waiting or not self._free_slots or plan.num_tokens == self.limits.max_tokens:
            return False
        reservation = self._reservation() if self.limits.admission == "reserve" else None
        absent: set[str] = set()  # adapters that are not in memory
        started: list[Request] = []
        try:
            for request in self.policy.select(self.waiting, self._batch, now):
                budget = self.limits.max_tokens - plan.num_tokens
                if budget == 0 or not self._free_slots:
                    break
                if request.in_flight or request.status is not Status.WAITING:
                    continue  # preempted a moment ago, its newest token is not read yet; or admitted already
                if not self._on_host(request.digest, absent):
                    continue  # on its way from disk (or failed: the engine ends it); others go ahead
                if not self._fits(request, reservation) or (not self.limits.mixed and request.num_tokens > budget):
                    break
                started.append(request)
                self._start(plan, request, now)
                count = min(request.num_tokens, budget)
                self._schedule_tokens(plan, request, count, self.pages_for(request.num_tokens))
        finally:
            for request in started:
                self.waiting.remove(request)
        return bool(started)

    def _reservation(self) -> Reservation:
        held = sum(len(request.pages) for request in self.running)
        return Reservation(self.running, self.evictor.within_reach(PageKind.KV) + held, self.limits.page_size)

    def _on_host(self, digest: str | None, absent: set[str]) -> bool:
        if digest is None or digest in self.residency:
            return True
        if digest in absent:
            return False
        if self._adapter_state(digest) is AdapterState.READY:
            return True
        absent.add(digest)
        return False

    def _fits(self, request: Request, reservation: Reservation | None) -> bool:
        adapter_pages = 0
        if request.adapter is not None:
            if not self.residency.can_acquire(request.adapter.digest):
                return False
            adapter_pages = self.residency.pages_to_admit(request.adapter.digest, request.adapter.num_pages)
        kv_pages = self.pages_for(request.num_tokens)
        if not self.evictor.can_make_room(kv_pages, adapter_pages):
            return False
        shared = self.allocator.shares_room(PageKind.KV, PageKind.ADAPTER)
        return reservation is None or reservation.take(request, adapter_pages if shared else 0)

    def _start(self, plan: StepPlan, request: Request, now: float) -> None:
        if request.adapter is not None:
            digest = request.adapter.digest
            resident, new = self.residency.acquire(digest, request.adapter.ranks, request.adapter.num_pages)
            request.adapter_slot = resident.slot
            self._adapters[digest] = self._adapters.get(digest, 0) + 1
            if new:
                plan.loads.append(resident)
        request.slot = self._free_slots.pop()
        request.status = Status.RUNNING
        if request.metrics.admitted is None:
            request.metrics.admitted = now
        insort(self.running, request, key=by_number)
        self.policy.admitted(request)

    def _schedule_tokens(self, plan: StepPlan, request: Request, count: int, num_new_pages: int) -> None:
        self.evictor.make_room(num_new_pages, PageKind.KV)
        request.pages += self.allocator.allocate(num_new_pages, PageKind.KV).tolist()
        start = request.num_computed
        request.num_computed += count
        samples = request.num_computed == request.num_tokens
        request.num_sampled += samples
        plan.sequences.append(ScheduledSequence(request, start, count, samples))
        plan.num_tokens += count

    def _preempt(self, request: Request) -> None:
        remove_sorted(self.running, request)
        self._release(request)
        request.num_computed = 0
        request.status = Status.WAITING
        request.metrics.preemptions += 1
        self.preemptions += 1
        self.waiting.add(request)

    def _release(self, request: Request) -> None:
        self.allocator.free(np.asarray(request.pages, np.int32))
        request.pages = []
        self._free_slots.append(request.slot)
        request.slot = -1
        if request.adapter is not None:
            digest = request.adapter.digest
            self.residency.release(digest)
            request.adapter_slot = -1
            self._adapters[digest] -= 1
            if not self._adapters[digest]:
                del self._adapters[digest]
