"""Continuous batching over the unified pool: admission, chunked prefill, preemption by recomputation."""

from __future__ import annotations

from bisect import insort
from collections.abc import Callable
from dataclasses import dataclass, field
from enum import Enum

import numpy as np

from slora_jax.memory import AdapterResidency, PageAllocator, PageKind, Resident
from slora_jax.scheduling.policy import Policy
from slora_jax.scheduling.request import FinishReason, Request, Status


class AdapterState(Enum):
    """Where an adapter's tiles are on the host."""

    READY = "ready"
    LOADING = "loading"
    FAILED = "failed"


@dataclass(slots=True)
class ScheduledSequence:
    """`count` tokens of a request from position `start` on. `samples`: its last known token is among them, so the next
    one is sampled."""

    request: Request
    start: int
    count: int
    samples: bool


@dataclass
class StepPlan:
    """What one step computes, and the adapters to upload before it."""

    sequences: list[ScheduledSequence] = field(default_factory=list)
    loads: list[Resident] = field(default_factory=list)
    num_tokens: int = 0
    preempted: int = 0


@dataclass(frozen=True)
class SchedulerLimits:
    """max_seqs: sequences running at once. max_tokens: rows of one step. page_size: tokens of a page."""

    max_seqs: int
    max_tokens: int
    page_size: int


class Scheduler:
    """Owns the queues. Every step: running sequences first (one token each, or their next prefill chunk), then as many
    waiting requests as the policy's order, the pages, the slots and the token budget allow.

    Admission needs pages for all tokens known so far, and for the adapter if it is not resident. When a running
    sequence needs a page and none is free, idle adapters go first; then the policy's last running request is preempted:
    its pages are freed and its tokens recomputed when it is admitted again.
    """

    def __init__(
        self,
        allocator: PageAllocator,
        residency: AdapterResidency,
        policy: Policy,
        limits: SchedulerLimits,
        adapter_state: Callable[[str], AdapterState] = lambda digest: AdapterState.READY,
    ) -> None:
        self.allocator = allocator
        self.residency = residency
        self.policy = policy
        self.limits = limits
        self.waiting: list[Request] = []  # in order of arrival
        self.running: list[Request] = []  # in order of arrival
        self.preemptions = 0
        self._adapter_state = adapter_state
        self._free_slots = list(range(limits.max_seqs - 1, -1, -1))

    def add(self, request: Request) -> None:
        self.waiting.append(request)

    def has_work(self) -> bool:
        return bool(self.waiting or self.running)

    def pages_for(self, num_tokens: int) -> int:
        return -(-num_tokens // self.limits.page_size)

    def schedule(self, now: float) -> StepPlan:
        """Plans the next step and commits to it: pages are taken, progress counters advance."""
        plan = StepPlan()
        self._extend_running(plan, now)
        if not plan.preempted:
            self._admit(plan, now)
        return plan

    def finish(self, request: Request, reason: FinishReason, now: float) -> None:
        """Ends a request in any state and frees what it holds. A no-op on a finished one."""
        if request.status is Status.FINISHED:
            return
        if request.status is Status.WAITING:
            self.waiting.remove(request)
        else:
            self.running.remove(request)
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

    def _extend_running(self, plan: StepPlan, now: float) -> None:
        order = list(self.policy.order(self.running, now))
        last = len(order)  # order[last:] is preempted
        for position, request in enumerate(order):
            budget = self.limits.max_tokens - plan.num_tokens
            if budget == 0 or position >= last:
                break
            if request.all_sampled:
                continue  # its last token is in flight
            count = min(request.num_tokens - request.num_computed, budget)
            needed = self.pages_for(request.num_computed + count) - len(request.pages)
            while not self._has_pages(needed) and last > position:
                last -= 1
                self._preempt(order[last])
                plan.preempted += 1
            if position < last:
                self._schedule_tokens(plan, request, count, needed)

    def _admit(self, plan: StepPlan, now: float) -> None:
        if not self.waiting or not self._free_slots:
            return
        for request in list(self.policy.order(self.waiting, now)):
            budget = self.limits.max_tokens - plan.num_tokens
            if budget == 0 or not self._free_slots:
                break
            if request.in_flight:
                continue  # preempted a moment ago; its newest token is not read yet
            use = request.adapter
            if use is not None and use.digest not in self.residency:
                if self._adapter_state(use.digest) is not AdapterState.READY:
                    continue  # on its way from disk (or failed: the engine ends it); others go ahead
            if not self._fits(request):
                break
            self._start(plan, request, now)
            self._schedule_tokens(plan, request, min(request.num_tokens, budget), self.pages_for(request.num_tokens))

    def _fits(self, request: Request) -> bool:
        needed = self.pages_for(request.num_tokens)
        if request.adapter is not None:
            if not self.residency.can_acquire(request.adapter.digest):
                return False
            needed += self.residency.pages_to_admit(request.adapter.digest, request.adapter.num_pages)
        return needed <= self.allocator.num_free + self.residency.evictable_pages

    def _has_pages(self, count: int) -> bool:
        self.residency.make_room(count)
        return self.allocator.can_allocate(count)

    def _start(self, plan: StepPlan, request: Request, now: float) -> None:
        if request.adapter is not None:
            resident, new = self.residency.acquire(
                request.adapter.digest, request.adapter.ranks, request.adapter.num_pages
            )
            request.adapter_slot = resident.slot
            if new:
                plan.loads.append(resident)
        self.waiting.remove(request)
        request.slot = self._free_slots.pop()
        request.status = Status.RUNNING
        if request.metrics.admitted is None:
            request.metrics.admitted = now
        insort(self.running, request, key=lambda r: r.number)

    def _schedule_tokens(self, plan: StepPlan, request: Request, count: int, num_new_pages: int) -> None:
        if num_new_pages > 0:
            self.residency.make_room(num_new_pages)
            request.pages += self.allocator.allocate(num_new_pages, PageKind.KV).tolist()
        start = request.num_computed
        request.num_computed += count
        samples = request.num_computed == request.num_tokens
        request.num_sampled += samples
        plan.sequences.append(ScheduledSequence(request, start, count, samples))
        plan.num_tokens += count

    def _preempt(self, request: Request) -> None:
        self.running.remove(request)
        self._release(request)
        request.num_computed = 0
        request.status = Status.WAITING
        request.metrics.preemptions += 1
        self.preemptions += 1
        insort(self.waiting, request, key=lambda r: r.number)

    def _release(self, request: Request) -> None:
        self.allocator.free(np.asarray(request.pages, np.int32))
        request.pages = []
        self._free_slots.append(request.slot)
        request.slot = -1
        if request.adapter is not None:
            self.residency.release(request.adapter.digest)
            request.adapter_slot = -1
