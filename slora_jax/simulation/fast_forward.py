"""Runs many decode steps at once while no other event is possible."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np

from slora_jax.engine.core import EngineCore, Update
from slora_jax.memory import PageKind
from slora_jax.metrics import Counters
from slora_jax.scheduling import Lcfs, Policy, Request, ScheduledSequence
from slora_jax.simulation.executor import SimulatedExecutor, SimulatedStep
from slora_jax.simulation.scheduler import SimulatedScheduler
from slora_jax.simulation.work import StepWork, step_work

MIN_STEPS = 2
"""Fewer steps are not worth a fast forward."""

STATIC_ORDERS = (Policy.order, Lcfs.order)
"""Orders that do not depend on time, so the order of the batch is fixed."""


class Replica(Protocol):
    """The part of `simulation.replica.Replica` that a fast forward uses."""

    @property
    def core(self) -> EngineCore[SimulatedStep]: ...
    @property
    def scheduler(self) -> SimulatedScheduler: ...
    @property
    def executor(self) -> SimulatedExecutor: ...
    def deliver(self) -> None: ...
    def end(self, requests: Iterable[Request]) -> None: ...
    def end_updates(self, updates: Iterable[Update[SimulatedStep]]) -> None: ...


def fast_forward(replica: Replica, until: float) -> bool:
    """Runs decode steps until a step might admit or preempt a request, or would be planned at `until` or later.

    Every step updates the clock (exactly as `EngineCore.step` does), the sums of the work and the policy; requests that
    end leave the batch. Progress, tokens and pages of requests are updated once for all steps.

    Returns:
      Whether any step ran.
    """
    scheduler = replica.scheduler
    if scheduler.may_change or type(scheduler.policy).order not in STATIC_ORDERS:
        return False
    batch = _decoding(scheduler, replica.core.clock())
    max_steps = 0 if batch is None else batch.steps_with_pages(scheduler)
    if batch is None or max_steps < MIN_STEPS:
        return False
    steps, reads = _run(replica, batch, max_steps, until)
    _update(replica, batch, steps, reads)
    return True


@dataclass(slots=True)
class Decoding:
    """Requests that decode a token in every step, in the order of the plan.

    Attributes:
      computed: tokens of each request with computed KV.
      remaining: tokens left to generate for each request.
      pages: pages held by each request.
    """

    requests: list[Request] = field(default_factory=list)
    computed: list[int] = field(default_factory=list)
    remaining: list[int] = field(default_factory=list)
    pages: list[int] = field(default_factory=list)

    def steps_with_pages(self, scheduler: SimulatedScheduler) -> int:
        """Steps for which the free pages suffice even if no request returns its pages; at most the longest output."""
        computed, remaining = np.array(self.computed), np.array(self.remaining)
        free, page_size = scheduler.allocator.available(PageKind.KV) + sum(self.pages), scheduler.config.page_size

        def suffice(steps: int) -> bool:
            return int((-(-(computed + np.minimum(steps, remaining)) // page_size)).sum()) <= free

        low, high = 0, max(self.remaining)
        if suffice(high):
            return high
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (middle, high) if suffice(middle) else (low, middle)
        return low


def _decoding(scheduler: SimulatedScheduler, now: float) -> Decoding | None:
    """The running requests except those whose last token is in flight. Returns None if there are none, if one has
    prompt tokens to compute, or if they do not fit into one step."""
    batch = Decoding()
    for request in scheduler.policy.order(scheduler.running, now):
        sampled, computed = request.num_sampled, request.num_computed
        remaining = request.max_new - sampled
        if remaining <= 0:
            continue
        if not sampled or len(request.prompt) + sampled - computed != 1:
            return None
        batch.requests.append(request)
        batch.computed.append(computed)
        batch.remaining.append(remaining)
        batch.pages.append(len(request.pages))
    return batch if 0 < len(batch.requests) <= scheduler.config.max_num_batched_tokens else None


class DecodingWork:
    """The work of a step of a `Decoding`, updated as steps pass and requests leave."""

    def __init__(self, batch: Decoding, ranks: Mapping[str, int], with_segments: bool) -> None:
        """Sums up the work of the first step.

        Args:
          ranks: by adapter digest.
          with_segments: also computes the segment fields, by a pass over the batch whenever a request leaves.
        """
        self.requests = batch.requests
        self._ranks = ranks
        self._with_segments = with_segments
        self._steps = 0
        self._users: dict[str, int] = {}
        for request in batch.requests:
            if request.adapter is not None:
                digest = request.adapter.digest
                self._users[digest] = self._users.get(digest, 0) + 1
        self.work = self._counted() if with_segments else self._summed(sum(batch.computed))

    def sequences(self) -> list[ScheduledSequence]:
        """The step's sequences, equal to the scheduler's plan."""
        return [ScheduledSequence(r, r.num_computed + self._steps, 1, True) for r in self.requests]

    def next_step(self, leaving: Sequence[Request]) -> None:
        """Advances every request by one token and removes `leaving`, which have generated their last."""
        self._steps += 1
        self.work.decode_context += self.work.decode_rows
        if not leaving:
            return
        gone = {request.number for request in leaving}
        self.requests = [request for request in self.requests if request.number not in gone]
        for request in leaving:
            if request.adapter is not None:
                self._users[request.adapter.digest] -= 1
                if not self._users[request.adapter.digest]:
                    del self._users[request.adapter.digest]
        if self._with_segments:
            self.work = self._counted()
        else:
            left = sum(request.num_computed + self._steps for request in leaving)
            self.work = self._summed(self.work.decode_context - left - self.work.decode_rows)

    def _counted(self) -> StepWork:
        return step_work(self.sequences(), self._ranks)

    def _summed(self, computed: int) -> StepWork:
        """The work without the segment fields; `computed` is the sum of tokens computed before this step."""
        rows = len(self.requests)
        work = StepWork(decode_rows=rows, decode_context=computed + rows, sampled=rows)
        for digest, users in self._users.items():
            rank = self._ranks[digest]
            work.lora_rows += users
            work.row_ranks += users * rank
            work.adapter_ranks += rank
            if rank > work.max_rank:
                work.max_rank = rank
        work.sequence_ranks, work.adapters = work.row_ranks, len(self._users)
        return work


def _run(replica: Replica, batch: Decoding, max_steps: int, until: float) -> tuple[int, list[float]]:
    """Returns the number of steps run and the read time of each step's tokens, except the last if steps overlap."""
    core, scheduler, executor = replica.core, replica.scheduler, replica.executor
    leaving: dict[int, list[Request]] = {}
    for request, remaining in zip(batch.requests, batch.remaining, strict=True):
        leaving.setdefault(remaining, []).append(request)
    current = DecodingWork(batch, executor.ranks, executor.cost.lora.pads)
    policy_observes = type(scheduler.policy).stepped is not Policy.stepped
    reads: list[float] = []
    steps = 0
    while steps < max_steps and current.requests:
        if steps:
            if core.clock() >= until:
                break
            replica.deliver()
            if scheduler.may_change:
                break
        scheduler.schedule_decode(current.sequences() if policy_observes else (), core.clock())
        core.counters.steps += 1
        core.counters.tokens_computed += current.work.rows
        before = core.exchange(executor.launch(current.work))
        steps += 1
        current.next_step(leaving.get(steps, ()))
        if before is None:
            continue
        if before.sequences:  # dispatched by the core
            replica.end_updates(core.read(before))
            continue
        executor.wait_for(before)
        reads.append(core.clock())
        replica.end(_completed(leaving.get(len(reads), ()), reads, scheduler))
    return steps, reads


def _completed(requests: Sequence[Request], reads: Sequence[float], scheduler: SimulatedScheduler) -> Sequence[Request]:
    """Returns the requests, completed with their whole output and, for a prefix cache, all their pages."""
    for request in requests:
        request.num_computed += len(reads)
        request.num_sampled += len(reads)
        _append(request, reads, scheduler.counters)
        if scheduler.prefixes is not None:
            needed = scheduler.pages_for(request.num_computed) - len(request.pages)
            request.pages += scheduler.allocator.allocate(needed, PageKind.KV).tolist()
    return requests


def _append(request: Request, reads: Sequence[float], counters: Counters) -> None:
    """Adds a token for each read time."""
    counters.tokens_generated += len(reads)
    request.output += [int(request.id)] * len(reads)
    request.token_times += reads


def _update(replica: Replica, batch: Decoding, steps: int, reads: Sequence[float]) -> None:
    """Updates progress and pages of requests that continue or whose last token is in flight."""
    allocator, page_size = replica.scheduler.allocator, replica.scheduler.config.page_size
    ended = len(reads)
    in_last: list[ScheduledSequence] = []
    growing: list[tuple[Request, int]] = []
    total = 0
    for request, computed, remaining, held in zip(
        batch.requests, batch.computed, batch.remaining, batch.pages, strict=True
    ):
        if remaining <= ended:
            continue
        done = steps if steps < remaining else remaining
        computed += done
        request.num_computed = computed
        request.num_sampled += done
        _append(request, reads, replica.core.counters)
        needed = -(-computed // page_size) - held
        if needed:
            growing.append((request, needed))
            total += needed
        if steps > ended and done == steps:
            in_last.append(ScheduledSequence(request, computed - 1, 1, True))
    pages = allocator.allocate(total, PageKind.KV).tolist()
    for request, needed in growing:
        total -= needed
        request.pages += pages[total : total + needed]
    if replica.core.in_flight is not None:
        replica.core.in_flight.sequences = in_last
