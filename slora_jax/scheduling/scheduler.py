"""Continuous batching over the unified pool: admission, chunked prefill, preemption by recomputation."""

from __future__ import annotations

from bisect import insort
from collections.abc import Callable, Sequence
from dataclasses import KW_ONLY, dataclass

import numpy as np

from slora_jax.errors import ConfigError, RequestError
from slora_jax.memory import AdapterResidency, PageKind, PrefixCache, PrefixNode
from slora_jax.scheduling.admission import ADMISSIONS
from slora_jax.scheduling.plan import ScheduledSequence, StepPlan
from slora_jax.scheduling.policy import Batch, Policy
from slora_jax.scheduling.prefetch import AdapterState, Prefetch
from slora_jax.scheduling.queue import RequestQueue, by_number, remove_sorted
from slora_jax.scheduling.request import FinishReason, Request, Status
from slora_jax.scheduling.reservation import Reservation

MOST_PASSED_OVER = 128
"""Waiting requests whose adapters are not there yet that others may overtake in one step: what a step looks at must not
grow with the queue."""


@dataclass(frozen=True)
class SchedulerLimits:
    """max_seqs: sequences running at once. max_tokens: rows of one step. page_size: tokens of a page.
    admission: "optimistic" admits what fits now; "reserve" what fits with all output it may still have (`Reservation`,
    the paper's).
    prefetch: adapters brought to the pool ahead of their requests' admission, and not used yet; 0: none, each is
    uploaded before the step that admits its request. upload_pages: copied to the device beside one step.
    admit_every: 1 tries to admit (and asks for the policy's aborts) in every step; n > 1 lets n steps decode after an
    admission, then tries in every step until one admits, and whenever nothing runs. The paper's code has 10.
    mixed: prefill and decode share steps, prompts in chunks. False, as in the paper's code: admitted requests prefill
    in a step of their own, whole, while the others pause; max_tokens then bounds the prompts of one admission."""

    max_seqs: int
    max_tokens: int
    page_size: int
    admission: str = "optimistic"
    _: KW_ONLY
    prefetch: int = 0
    upload_pages: int = 32
    admit_every: int = 1
    mixed: bool = True

    def __post_init__(self) -> None:
        for name, least in (("prefetch", 0), ("upload_pages", 1)):
            if getattr(self, name) < least:
                raise ConfigError(f"SchedulerLimits.{name}={getattr(self, name)!r}: must be at least {least}")
        if self.admission not in ADMISSIONS:
            raise ConfigError(f"SchedulerLimits.admission={self.admission!r}: must be one of {ADMISSIONS}")
        every = self.admit_every
        if not isinstance(every, int) or isinstance(every, bool) or every < 1:
            raise ConfigError(f"SchedulerLimits.admit_every={every!r}: must be an integer of at least 1")


class Scheduler:
    """Owns the queues. Every step: the policy's aborts; then running sequences (one token each, or their next prefill
    chunk); then as many waiting requests as the policy's selection, the pages, the slots and the token budget allow.

    With prefetch, adapters come to the pool beside the steps (`Prefetch`), and a request whose adapter is still on its
    way does not start. Others go ahead of it meanwhile, though never with the pages of an adapter that is awaited, nor
    with those that it needs itself; once its adapter has landed it is first in line again, as the policy says. If the
    adapter is lost to running sequences before that, it is brought once more, and nobody goes ahead: no request is
    overtaken without end.

    Admission needs pages for all tokens known so far, and for the adapter if it is not resident; under "reserve" for
    all tokens to come as well. When a running sequence needs a page and none is free, what is idle goes first; then the
    policy's last running request is preempted: its pages are freed and its tokens recomputed when it is admitted again.

    With a prefix cache, a request is admitted with the pages that hold the beginning of its tokens, and computes the
    rest, at least its last token. Full pages of prompts are shared from the plan on that computes them: the device runs
    the steps in order, and writes a layer's keys and values before it attends, so that even requests of the same step
    may read them. Full pages of output follow when the request ends or is preempted.
    """

    def __init__(
        self,
        residency: AdapterResidency,
        policy: Policy,
        limits: SchedulerLimits,
        adapter_state: Callable[[str], AdapterState] = lambda digest: AdapterState.READY,
        prefixes: PrefixCache | None = None,
    ) -> None:
        self.residency = residency
        self.evictor = residency.evictor
        self.allocator = residency.evictor.allocator
        self.policy = policy
        self.limits = limits
        self.prefixes = prefixes
        self.waiting = RequestQueue()
        self.running: list[Request] = []  # in order of arrival
        self.preemptions = 0
        self.aborts = 0
        self.prompt_tokens = 0  # known when admitted: prompts, and output of those that were preempted
        self._adapter_state = adapter_state
        self._prefetch = Prefetch(residency, limits.prefetch, limits.page_size, adapter_state)
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
        if self.prefixes is not None:
            request.token_bytes()  # made now, rather than within a step

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
        if self.limits.prefetch:
            if not plan.preempted:
                self._look_ahead(now)
            plan.uploads = self.residency.uploads(self.limits.upload_pages)
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

    def abandon(self, plan: StepPlan, finish: Callable[[Request], None]) -> None:
        """Takes a plan back that did not reach the device: ends its requests by `finish`, and forgets the prefixes that
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
        taken, within_reach = 0, self.evictor.within_reach(PageKind.KV)
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
                while taken + needed > within_reach and last > position:
                    last -= 1
                    self._preempt(order[last])
                    plan.preempted += 1
                    within_reach = self.evictor.within_reach(PageKind.KV)
                if position >= last:
                    break
                growing.append((request, needed))
                taken += needed
            request.num_computed = end
            if end == known:
                request.num_sampled = sampled + 1
            sequences.append(ScheduledSequence(request, start, end - start, end == known))
            budget -= end - start
        plan.num_tokens = self.limits.max_tokens - budget
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
        """Whether anyone was admitted."""
        if not self.waiting or not self._free_slots or plan.num_tokens == self.limits.max_tokens:
            return False
        reservation = self._reservation() if self.limits.admission == "reserve" else None
        absent: set[str] = set()  # adapters that are not in memory
        kept: int | None = None  # pages left to those ahead whose adapters are on their way, if there are any
        started: list[Request] = []
        try:
            for position, request in enumerate(self.policy.select(self.waiting, self._batch, now), 1):
                budget = self.limits.max_tokens - plan.num_tokens
                passed_over = position - 1 - len(started)
                if budget == 0 or not self._free_slots or passed_over > MOST_PASSED_OVER:
                    break
                if plan.extra and len(self.running) + plan.extra >= self.limits.max_seqs:
                    break
                if request.in_flight or request.status is not Status.WAITING:
                    continue  # preempted a moment ago, its newest token is not read yet; or admitted already
                if not self._on_host(request.digest, absent):
                    continue  # on its way from disk (or failed: the engine ends it); others go ahead
                if self.limits.prefetch and not self._has_landed(request):
                    if not self._bring(request, position - len(started), kept):
                        break
                    if request.digest in self.residency:
                        kept = (kept or 0) + self.pages_for(request.num_tokens)
                    continue
                if not self.limits.mixed and request.num_tokens > budget:
                    break
                prefix = self._match(request)
                if not self._fits(request, prefix, reservation, kept):
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

    def _end_scored(self, plan: StepPlan, request: Request, start: int, end: int) -> int:
        """Returns the end of a chunk of scored tokens that begins at `start`: at most `end`, and before the last token
        of the prompt. Each scored token is a sequence of the step's batch, which has at most `max_seqs` in all."""
        spare = max(0, self.limits.max_seqs - len(self.running) - plan.extra)
        count = min(end, request.num_scored) - start
        count = min(count, 1 + spare)
        plan.extra += count - 1
        return start + count

    def _reservation(self) -> Reservation:
        return Reservation(self.running, self.evictor.within_reach(PageKind.KV), self.limits.page_size)

    def _match(self, request: Request) -> PrefixNode | None:
        """What the prefix cache has of a request's tokens: never all of them, as computing the last one samples."""
        if self.prefixes is None or request.num_scored:
            return None
        most = (request.num_tokens - 1) // self.limits.page_size
        return self.prefixes.match(request.digest, request.token_bytes(), most)

    def _register(self, request: Request, plan: StepPlan | None = None) -> None:
        """Brings a request's full pages to the prefix cache, as far as the host knows their tokens; those that `plan`
        is to compute, or, None, those that dispatched steps have computed."""
        if self.prefixes is None:
            return
        before = request.num_shared
        full = min(request.num_computed, len(request.prompt) + len(request.output)) // self.limits.page_size
        if full <= before:
            return
        pages = request.pages[before:full]
        request.prefix = self.prefixes.extend(request.prefix, request.digest, request.token_bytes(), pages)
        if plan is not None and request.prefix is not None and request.prefix.depth > before:
            plan.registered.append((request.prefix, before))

    def _on_host(self, digest: str | None, absent: set[str]) -> bool:
        if digest is None or digest in self.residency:
            return True
        if digest in absent:
            return False
        if self._adapter_state(digest) is AdapterState.READY:
            return True
        absent.add(digest)
        return False

    def _fits(
        self, request: Request, prefix: PrefixNode | None, reservation: Reservation | None, kept: int | None
    ) -> bool:
        """Whether there is room: for one that overtakes others, beside what they need and a page for each that runs,
        and without evicting what anyone waits for."""
        overtakes = kept is not None
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
        if kept is not None:
            kv_pages += kept + len(self.running)
        if not self.evictor.can_make_room(kv_pages, taken, overtakes):
            return False
        shared = self.allocator.shares_room(PageKind.KV, PageKind.ADAPTER)
        return reservation is None or reservation.take(request, adapter_pages if shared else 0, prefix, idle_pages)

    def _has_landed(self, request: Request) -> bool:
        resident = None if request.digest is None else self.residency.find(request.digest)
        return request.digest is None or (resident is not None and resident.has_landed)

    def _bring(self, request: Request, position: int, kept: int | None) -> bool:
        """Puts the adapter of the `position`th waiting request on its way, if it is not. Whether others may go ahead
        meanwhile: not if there is no room for request and adapter, nor if this adapter was lost once.

        As the order may change with every arrival, each new first one could bring another adapter for the same slot
        and evict the one before. So no more are on their way than there are slots for, and those that were brought are
        used first."""
        use, residency = request.adapter, self.residency
        assert use is not None
        resident = residency.find(use.digest)
        if resident is None:
            if len(residency.arriving) >= len(self._free_slots):
                return True
            kv_pages = self.pages_for(request.num_tokens) + (kept or 0) + len(self.running)
            spare = kept is not None or residency.num_unused > 0
            if not residency.can_acquire(use.digest, spare) or not (
                self.evictor.can_make_room(kv_pages, use.num_pages, spare)
            ):
                return residency.num_unused > 0
            resident = residency.bring(use.digest, use.ranks, use.num_pages, position, spare)
        resident.kept_waiting |= position <= len(self._free_slots)
        return use.digest not in residency.bereft

    def _look_ahead(self, now: float) -> None:
        upcoming = self.policy.upcoming(self.waiting, self._batch, now)
        self._prefetch.look_ahead(upcoming, self.waiting.by_adapter, len(self.running))

    def _start(self, plan: StepPlan, request: Request, prefix: PrefixNode | None, now: float) -> None:
        self.prompt_tokens += request.num_tokens
        if prefix is not None and self.prefixes is not None:
            request.prefix, request.pages = prefix, self.prefixes.acquire(prefix)  # before anything is evicted
            request.num_computed = prefix.depth * self.limits.page_size
            plan.hits.append(request)
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
        self.preemptions += 1
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
            digest = request.adapter.digest
            self.residency.release(digest)
            request.adapter_slot = -1
            self._adapters[digest] -= 1
            if not self._adapters[digest]:
                del self._adapters[digest]
