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
"""Waiting requests whose adapters are not ready that others may overtake in one step: the work of a step must not grow
with the queue."""


class Scheduler:
    """Owns the queues. Every step: the policy's aborts; then running sequences (one token each, or their next prefill
    chunk); then as many waiting requests as the policy's selection, the pages, the slots and the token budget allow.

    With prefetch, adapters are uploaded beside the steps (`Prefetch`), and a request whose adapter has not landed does
    not start. Others go ahead of it meanwhile, though never with the pages of an adapter that is awaited, nor with
    those that it needs itself; once its adapter has landed it is first in line again, as the policy says. If the
    adapter is evicted for running sequences before that, it is uploaded once more, and no request goes ahead: no
    request is overtaken without end.

    Admission needs pages for all tokens known so far, and for the adapter if it is not resident; under "reserve" for
    all tokens to come as well. When a running sequence needs a page and none is free, idle content is evicted first;
    then the policy's last running request is preempted: its pages are freed and its tokens recomputed when it is
    admitted again.

    With a prefix cache, a request is admitted with the pages that hold the beginning of its tokens, and computes the
    rest, at least its last token. Full pages of prompts are shared from the plan on that computes them: the device runs
    the steps in order, and writes a layer's keys and values before it attends, so that even requests of the same step
    may read them. Full pages of output follow when the request ends or is preempted.
    """

    def __init__(
        self,
        residency: AdapterResidency,
        policy: Policy,
        config: CoreConfig,
        adapters: AdapterSource,
        prefixes: PrefixCache | None = None,
    ) -> None:
        """adapters: the executor's host side."""
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
        """Counters of the engine."""
        return self.evictor.counters

    def add(self, request: Request) -> None:
        """Queues a request that fits into the pool alone."""
        self.policy.arrived(request, self.waiting)
        self.waiting.add(request)
        if self.prefixes is not None:
            request.token_bytes()  # made now, rather than within a step

    def has_work(self) -> bool:
        """Returns whether any request waits or runs."""
        return bool(self.waiting or self.running)

    def next_digest(self, now: float) -> str | None:
        """The adapter of the request that would be admitted next, among those whose adapter is not in the pool."""
        upcoming = islice(self.policy.upcoming(self.waiting, self._batch, now), MOST_PASSED_OVER)
        return next((r.digest for r in upcoming if r.digest is not None and r.digest not in self.residency), None)

    def pages_for(self, num_tokens: int) -> int:
        return -(-num_tokens // self.config.page_size)

    def schedule(self, now: float) -> StepPlan:
        """Plans the next step and commits to it: pages are taken, progress counters advance."""
        plan = StepPlan()
        self._abort(plan, now)
        self._extend_running(plan, now)
        if not plan.preempted:
            self._admit(plan, now)
        self._plan_uploads(plan, now)
        self.policy.stepped(plan.sequences)
        return plan

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

    def abandon(self, plan: StepPlan, finish: Callable[[Request], None]) -> None:
        """Withdraws a plan that did not reach the device: ends its requests by `finish`, and forgets the prefixes that
        it was to compute."""
        for sequence in plan.sequences:
            sequence.request.num_computed = sequence.start
            finish(sequence.request)
        for node, before in reversed(plan.registered):
            assert self.prefixes is not None
            self.prefixes.forget(node, before)

    def check(self) -> None:
        """Compares page ownership with the allocator's books; raises `PoolError` on any leak."""
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
        """Written for a thousand sequences in well under a millisecond: no call per sequence that only decodes."""
        order = list(self.policy.order(self.running, now))
        last = len(order)  # order[last:] is preempted
        budget, page_size, sequences = self.config.max_num_batched_tokens, self.config.page_size, plan.sequences
        growing: list[tuple[Request, int]] = []  # and the pages that each gets at the end
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
            if end - start > 1 and start < request.num_scored:
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
        if plan.num_tokens > len(sequences):  # prompts are among them
            for sequence in sequences:
                if sequence.start < len(sequence.request.prompt):
                    self._register(sequence.request, plan)

    def _admit(self, plan: StepPlan, now: float) -> bool:
        """Admits waiting requests; returns whether it admitted any."""
        if not self.waiting or not self._free_slots or plan.num_tokens == self.config.max_num_batched_tokens:
            return False
        reservation = self._reservation() if self.config.admission == "reserve" else None
        absent: set[str] = set()  # adapters that are not in host memory
        reserved_pages: int | None = None  # for those ahead whose adapters have not landed, if there are any
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
                    continue  # preempted a moment ago, its newest token is not read yet; or admitted already
                if not self._prefetch.on_host(request.digest, absent):
                    continue  # being read from disk (or lost: the core ends it); others go ahead
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
                if count > 1 and request.num_computed < request.num_scored:
                    start = request.num_computed
                    count = self._end_scored(plan, request, start, start + count) - start
                self._schedule_tokens(plan, request, count, self.pages_for(request.num_tokens) - len(request.pages))
                self._register(request, plan)
        finally:
            for request in started:
                self.waiting.remove(request)
        return bool(started)

    def _fits_budget(self, request: Request, budget: int) -> bool:
        """Returns whether a request may start with `budget` rows left in the step: always, as prompts run in chunks."""
        return True

    def _plan_uploads(self, plan: StepPlan, now: float) -> None:
        """Prefetches for the head of the queue, and plans the pages to copy beside the step."""
        most = self.config.upload_pages_per_step
        if not self.config.prefetch:
            return
        if not plan.preempted:
            upcoming = self.policy.upcoming(self.waiting, self._batch, now)
            self._prefetch.look_ahead(upcoming, self.waiting.by_adapter, len(self.running))
        plan.uploads = self.residency.uploads(min(most, 2 * most - self._adapters.pages_in_flight))

    def _end_scored(self, plan: StepPlan, request: Request, start: int, end: int) -> int:
        """Returns the end of a chunk of scored tokens that begins at `start`: at most `end`, and before the last token
        of the prompt. Each scored token is a sequence of the step's batch, which has at most `max_num_seqs` in all."""
        spare = max(0, self.config.max_num_seqs - len(self.running) - plan.extra)
        count = min(end, request.num_scored) - start
        count = min(count, 1 + spare)
        plan.extra += count - 1
        return start + count

    def _reservation(self) -> Reservation:
        return Reservation(self.running, self.evictor.available(PageKind.KV), self.config.page_size)

    def _match(self, request: Request) -> PrefixNode | None:
        """The deepest cached prefix of a request's tokens: never all of them, as computing the last one samples."""
        if self.prefixes is None or request.num_scored:
            return None
        most = (request.num_tokens - 1) // self.config.page_size
        return self.prefixes.match(request.digest, request.token_bytes(), most)

    def _register(self, request: Request, plan: StepPlan | None = None) -> None:
        """Adds a request's full pages to the prefix cache, as far as the host knows their tokens: those that `plan`
        will compute, or (None) those that dispatched steps have computed."""
        if self.prefixes is None:
            return
        before = request.num_shared
        full = min(request.num_computed, len(request.prompt) + len(request.output)) // self.config.page_size
        if full <= before:
            return
        pages = request.pages[before:full]
        request.prefix = self.prefixes.extend(request.prefix, request.digest, request.token_bytes(), pages)
        if plan is not None and request.prefix is not None and request.prefix.depth > before:
            plan.registered.append((request.prefix, before))

    def _fits(
        self, request: Request, prefix: PrefixNode | None, reservation: Reservation | None, reserved_pages: int | None
    ) -> bool:
        """Returns whether there is room for a request: for one that overtakes others (`reserved_pages` for them),
        beside what they need and a page for each running sequence, and without evicting awaited content."""
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
            idle_pages = self.prefixes.idle_pages(prefix)  # in use from now on, so no room for anything else
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
            request.prefix, request.pages = prefix, self.prefixes.acquire(prefix)  # before anything is evicted
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
