"""Continuous batching over the unified pool: admission, chunked prefill, preemption by recomputation."""

from __future__ import annotations

from bisect import insort
from collections.abc import Callable
from itertools import islice

import numpy as np

from slora_jax.memory import AdapterResidency, PageKind, PrefixCache, PrefixNode
from slora_jax.metrics import Counters, FinishReason
from slora_jax.scheduling.config import CoreConfig
from slora_jax.scheduling.plan import ScheduledSequence, StepPlan
from slora_jax.scheduling.policy import Batch, Policy
from slora_jax.scheduling.prefetch import AdapterSource, Prefetch
from slora_jax.scheduling.queue import RequestQueue, by_number, remove_sorted
from slora_jax.scheduling.request import Request, Status
from slora_jax.scheduling.reservation import Reservation

MOST_PASSED_OVER = 128
"""Maximum number of waiting requests skipped in one step because their adapters are not ready. It bounds the step's
work, however long the queue."""


class Scheduler:
    """Owns the queues and plans each step.

    A step aborts the requests that the policy names, then extends running sequences (one token, or the next prefill
    chunk), then admits waiting requests in the policy's order while pages, slots and the token budget allow.

    Admission needs pages for all known tokens, and for the adapter if it is not resident; with "reserve", also for all
    tokens still to come. When a running sequence needs a page and none is free, idle content is evicted first. Then the
    running request that the policy ranks last is preempted: its pages are freed, and its tokens are recomputed after
    it is admitted again.

    With prefetch, adapters are uploaded while steps run (`Prefetch`), and a request starts once its adapter has landed.
    Until then, requests behind it may be admitted, but not with pages that it needs or that hold an awaited adapter.
    If its adapter is evicted before use to make room for running sequences, the adapter is uploaded again and no
    request behind it is admitted, which bounds how often a request is overtaken.

    With a prefix cache, a request is admitted with the cached pages of its prefix and computes the rest, at least its
    last token. Full prompt pages are shared as soon as they are planned, even within a step: the device runs steps in
    order, and each layer writes KV before it attends. Full output pages are shared when the request ends or is
    preempted.
    """

    def __init__(
        self,
        residency: AdapterResidency,
        policy: Policy,
        config: CoreConfig,
        adapters: AdapterSource,
        prefixes: PrefixCache | None = None,
    ) -> None:
        self.residency = residency
        self.evictor = residency.evictor
        self.allocator = residency.evictor.allocator
        self.policy = policy
        self.config = config
        self.prefixes = prefixes
        self.waiting = RequestQueue()
        self.running: list[Request] = []  # in order of arrival
        self._adapters = adapters
        self._prefetch = Prefetch(residency, config.prefetch, config.page_size, adapters)
        self._batch = Batch(self.running, residency.users)
        self._free_slots = list(range(config.max_num_seqs - 1, -1, -1))

    @property
    def counters(self) -> Counters:
        return self.evictor.counters

    def add(self, request: Request) -> None:
        """Queues a request. The caller has checked that it fits into the pool alone."""
        self.policy.arrived(request, self.waiting)
        self.waiting.add(request)
        if self.prefixes is not None:
            request.token_bytes()  # computed here rather than within a step

    def has_work(self) -> bool:
        """Returns whether any request is waiting or running."""
        return bool(self.waiting or self.running)

    def next_digest(self, now: float) -> str | None:
        """Returns the first absent adapter in the likely order of admission, or None."""
        upcoming = islice(self.policy.upcoming(self.waiting, self._batch, now), MOST_PASSED_OVER)
        return next((r.digest for r in upcoming if r.digest is not None and r.digest not in self.residency), None)

    def pages_for(self, num_tokens: int) -> int:
        return -(-num_tokens // self.config.page_size)

    def schedule(self, now: float) -> StepPlan:
        """Plans the step at `now` (seconds), allocates its pages and advances the requests' progress counters."""
        plan = StepPlan()
        self._abort(plan, now)
        self._extend_running(plan, now)
        if not plan.preempted:
            self._admit(plan, now)
        self._plan_uploads(plan, now)
        self.policy.stepped(plan.sequences)
        return plan

    def finish(self, request: Request, reason: FinishReason, now: float) -> None:
        """Ends a request in any state and frees its pages, slot and adapter. No-op if it is finished."""
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

    def abandon(self, plan: StepPlan, finish: Callable[[Request], None]) -> None:
        """Rolls back a plan that was not dispatched: ends its requests by `finish` and evicts its new prefix pages."""
        for sequence in plan.sequences:
            sequence.request.num_computed = sequence.start
            finish(sequence.request)
        for node, before in reversed(plan.registered):
            assert self.prefixes is not None
            self.prefixes.forget(node, before)

    def check(self) -> None:
        """Checks page ownership against the allocator. Raises PoolError if a page is leaked or has two owners."""
        prefixes = self.prefixes
        self.allocator.check_owned(
            {
                PageKind.KV: [np.asarray(r.pages[r.num_shared :], np.int32) for r in self.running],
                PageKind.ADAPTER: [r.pages for r in self.residency.residents],
                PageKind.PREFIX: [] if prefixes is None else [prefixes.pages()],
            }
        )
        if prefixes is not None:
            prefixes.check([r.prefix for r in self.running if r.prefix is not None])

    def _abort(self, plan: StepPlan, now: float) -> None:
        for request, reason in list(self.policy.aborts(self.waiting, self._batch, now)):
            if request.status is Status.WAITING and not request.num_sampled:
                self.finish(request, FinishReason.ABORT, now)
                plan.aborted.append((request, reason))
                self.counters.aborts += 1

    def _extend_running(self, plan: StepPlan, now: float) -> None:
        """Schedules running sequences, preempting if pages run out. Inlined for speed at a thousand sequences."""
        order = list(self.policy.order(self.running, now))
        last = len(order)  # order[last:] is preempted
        budget, page_size, sequences = self.config.max_num_batched_tokens, self.config.page_size, plan.sequences
        growing: list[tuple[Request, int]] = []  # requests with the number of pages to add
        taken, available = 0, self.evictor.available(PageKind.KV)
        for position, request in enumerate(order):
            if budget == 0 or position >= last:
                break
            sampled = request.num_sampled
            if sampled >= request.max_new:
                continue  # its last token is in flight
            start = request.num_computed
            known = len(request.prompt) + sampled
            end = known if known - start <= budget else start + budget
            if end - start > 1:
                if start < request.adapter_start < end:
                    end = request.adapter_start
                if start < request.num_scored:
                    end = self._end_scored(plan, request, start, end)
            if end > len(request.pages) * page_size:
                needed = -(-end // page_size) - len(request.pages)
                while taken + needed > available and last > position:
                    last -= 1
                    self._preempt(order[last])
                    plan.preempted += 1
                    available = self.evictor.available(PageKind.KV)
                if position >= last:
                    break
                growing.append((request, needed))
                taken += needed
            request.num_computed = end
            if end == known:
                request.num_sampled = sampled + 1
            sequences.append(ScheduledSequence(request, start, end - start, end == known))
            budget -= end - start
        plan.num_tokens = self.config.max_num_batched_tokens - budget
        self.evictor.make_room(taken, PageKind.KV)
        pages = self.allocator.allocate(taken, PageKind.KV).tolist()
        for request, needed in growing:
            taken -= needed
            request.pages += pages[taken : taken + needed]
        if plan.num_tokens > len(sequences):  # at least one prefill chunk
            for sequence in sequences:
                if sequence.start < len(sequence.request.prompt):
                    self._register(sequence.request, plan)

    def _admit(self, plan: StepPlan, now: float) -> bool:
        """Admits waiting requests. Returns whether it admitted any."""
        if not self.waiting or not self._free_slots or plan.num_tokens == self.config.max_num_batched_tokens:
            return False
        reservation = self._reservation() if self.config.admission == "reserve" else None
        absent: set[str] = set()  # adapters not in host memory
        reserved_pages: int | None = None  # for requests ahead that wait for their adapters; None without any
        started: list[Request] = []
        try:
            for position, request in enumerate(self.policy.select(self.waiting, self._batch, now), 1):
                budget = self.config.max_num_batched_tokens - plan.num_tokens
                passed_over = position - 1 - len(started)
                if budget == 0 or not self._free_slots or passed_over > MOST_PASSED_OVER:
                    break
                if plan.extra and len(self.running) + plan.extra >= self.config.max_num_seqs:
                    break
                if request.in_flight or request.status is not Status.WAITING:
                    continue  # just preempted with a token still unread, or already admitted
                if not self._prefetch.on_host(request.digest, absent):
                    continue  # being read from disk; if the read failed, the core ends the request
                if self.config.prefetch and not self._prefetch.has_landed(request.digest):
                    num_ahead = self.pages_for(request.num_tokens) + (reserved_pages or 0) + len(self.running)
                    if not self._prefetch.upload_for(
                        request, position - len(started), num_ahead, reserved_pages is not None, len(self._free_slots)
                    ):
                        break
                    if request.digest in self.residency:
                        reserved_pages = (reserved_pages or 0) + self.pages_for(request.num_tokens)
                    continue
                if not self._fits_budget(request, budget):
                    break
                prefix = self._match(request)
                if not self._fits(request, prefix, reservation, reserved_pages):
                    break
                started.append(request)
                self._start(plan, request, prefix, now)
                count = min(request.num_tokens - request.num_computed, budget)
                start = request.num_computed
                if start < request.adapter_start < start + count:
                    count = request.adapter_start - start
                if count > 1 and start < request.num_scored:
                    count = self._end_scored(plan, request, start, start + count) - start
                self._schedule_tokens(plan, request, count, self.pages_for(request.num_tokens) - len(request.pages))
                self._register(request, plan)
        finally:
            for request in started:
                self.waiting.remove(request)
        return bool(started)

    def _fits_budget(self, request: Request, budget: int) -> bool:
        """Returns whether a request may start with `budget` tokens left in the step. Always, as prefill is chunked."""
        return True

    def _plan_uploads(self, plan: StepPlan, now: float) -> None:
        """Prefetches for the head of the queue and plans the pages to upload during the step."""
        most = self.config.upload_pages_per_step
        if not self.config.prefetch:
            return
        if not plan.preempted:
            upcoming = self.policy.upcoming(self.waiting, self._batch, now)
            self._prefetch.look_ahead(upcoming, self.waiting.by_adapter, len(self.running))
        plan.uploads = self.residency.uploads(min(most, 2 * most - self._adapters.pages_in_flight))

    def _end_scored(self, plan: StepPlan, request: Request, start: int, end: int) -> int:
        """Returns the end of a chunk of scored tokens `start .. end`, cut before the prompt's last token and to the
        free sequences of the batch: each scored token is one of its `max_num_seqs` sequences."""
        free = max(0, self.config.max_num_seqs - len(self.running) - plan.extra)
        count = min(end, request.num_scored) - start
        count = min(count, 1 + free)
        plan.extra += count - 1
        return start + count

    def _reservation(self) -> Reservation:
        return Reservation(self.running, self.evictor.available(PageKind.KV), self.config.page_size)

    def _match(self, request: Request) -> PrefixNode | None:
        """Deepest cached prefix of a request, without its last token, which must be computed to sample the next one."""
        if self.prefixes is None or request.needs_whole_prompt:
            return None
        most = (request.num_tokens - 1) // self.config.page_size
        return self.prefixes.match(request.digest, request.token_bytes(), most, request.adapter_start)

    def _register(self, request: Request, plan: StepPlan | None = None) -> None:
        """Adds a request's full pages to the prefix cache, as far as the host knows their tokens. `plan` computes them;
        None if dispatched steps did."""
        if self.prefixes is None:
            return
        before = request.num_shared
        full = min(request.num_computed, len(request.prompt) + len(request.output)) // self.config.page_size
        if full <= before:
            return
        pages = request.pages[before:full]
        tokens, start = request.token_bytes(), request.adapter_start
        request.prefix = self.prefixes.extend(request.prefix, request.digest, tokens, pages, start)
        if plan is not None and request.prefix is not None and request.prefix.depth > before:
            plan.registered.append((request.prefix, before))

    def _fits(
        self, request: Request, prefix: PrefixNode | None, reservation: Reservation | None, reserved_pages: int | None
    ) -> bool:
        """Returns whether a request can be admitted with its adapter.

        Args:
          reserved_pages: pages for requests that it overtakes; None if it overtakes none. An overtaking request must
            also leave one page per running sequence and must not evict awaited content.
        """
        overtakes = reserved_pages is not None
        adapter_pages = taken = 0
        if request.adapter is not None:
            digest, num_pages = request.adapter.digest, request.adapter.num_pages
            if not self.residency.can_acquire(digest, overtakes):
                return False
            adapter_pages = self.residency.pages_to_admit(digest, num_pages)
            taken = self.residency.pages_to_admit(digest, num_pages, overtakes)
        kv_pages, idle_pages = self.pages_for(request.num_tokens), 0
        if prefix is not None and self.prefixes is not None:
            idle_pages = self.prefixes.idle_pages(prefix)  # no longer evictable after admission
            kv_pages += idle_pages - prefix.depth
        if reserved_pages is not None:
            kv_pages += reserved_pages + len(self.running)
        if not self.evictor.can_make_room(kv_pages, taken, overtakes):
            return False
        shared = self.allocator.shares_room(PageKind.KV, PageKind.ADAPTER)
        return reservation is None or reservation.take(request, adapter_pages if shared else 0, prefix, idle_pages)

    def _start(self, plan: StepPlan, request: Request, prefix: PrefixNode | None, now: float) -> None:
        self.counters.prompt_tokens += request.num_tokens
        if prefix is not None and self.prefixes is not None:
            request.prefix, request.pages = prefix, self.prefixes.acquire(prefix)  # before any eviction
            request.num_computed = prefix.depth * self.config.page_size
            plan.hits.append(request)
        if request.adapter is not None:
            digest = request.adapter.digest
            resident, new = self.residency.acquire(digest, request.adapter.ranks, request.adapter.num_pages)
            request.adapter_slot = resident.slot
            if new:
                plan.loads.append(resident)
        request.slot = self._free_slots.pop()
        request.status = Status.RUNNING
        if request.metrics.admitted is None:
            request.metrics.admitted = now
            request.metrics.cached_tokens = request.num_computed
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
        self.counters.preemptions += 1
        self.waiting.add(request)

    def _release(self, request: Request) -> None:
        self._register(request)
        self.allocator.free(np.asarray(request.pages[request.num_shared :], np.int32))
        request.pages = []
        if request.prefix is not None and self.prefixes is not None:
            self.prefixes.release(request.prefix)
            request.prefix = None
        self._free_slots.append(request.slot)
        request.slot = -1
        if request.adapter is not None:
            self.residency.release(request.adapter.digest)
            request.adapter_slot = -1
