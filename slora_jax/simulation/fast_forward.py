"""Many decode steps at once, where nothing but decoding can happen."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, cast

import numpy as np

from slora_jax.memory import PageKind
from slora_jax.scheduling import Lcfs, Policy, Request, ScheduledSequence, Scheduler
from slora_jax.simulation.work import StepWork, step_work

if TYPE_CHECKING:
    from slora_jax.simulation.server import Server

LEAST_STEPS = 2
"""Fewer steps are not worth it."""


class Decoding:
    """The work of a batch in which everyone decodes, kept up to date as it goes on and some leave."""

    def __init__(self, requests: Sequence[Request], ranks: Mapping[str, int], with_segments: bool) -> None:
        """ranks: by adapter digest. with_segments: whether the fields of runs are wanted; they cost a pass."""
        self.requests = list(requests)
        self._ranks = ranks
        self._with_segments = with_segments
        self._steps = 0
        self._users = Counter(request.digest for request in requests if request.digest is not None)
        self.work = step_work(self.sequences(), ranks)

    def sequences(self) -> list[ScheduledSequence]:
        """As the scheduler would plan them."""
        return [ScheduledSequence(r, r.num_computed + self._steps, 1, True) for r in self.requests]

    def next_step(self) -> None:
        """Everyone has one more token."""
        self._steps += 1
        self.work.decode_context += self.work.decode_rows

    def leave(self, requests: Sequence[Request]) -> None:
        """Some will not be in the next step."""
        gone = {request.number for request in requests}
        self.requests = [request for request in self.requests if request.number not in gone]
        if self._with_segments:
            self.work = step_work(self.sequences(), self._ranks)
            return
        work = self.work
        for request in requests:
            work.decode_rows -= 1
            work.sampled -= 1
            work.decode_context -= request.num_computed + self._steps + 1
            if request.digest is None:
                continue
            rank = self._ranks[request.digest]
            work.lora_rows -= 1
            work.row_ranks -= rank
            work.sequence_ranks -= rank
            self._users[request.digest] -= 1
            if not self._users[request.digest]:
                del self._users[request.digest]
                work.adapters -= 1
                work.adapter_ranks -= rank
                if rank == work.max_rank:
                    work.max_rank = max((self._ranks[digest] for digest in self._users), default=0)


STATIC_ORDERS = (Policy.order, Lcfs.order)
"""Precedence that does not change with time, so that the order of the batch does not either."""


def fast_forward(server: Server, until: float) -> bool:
    """Runs as many steps as are certain to admit and preempt nobody, all sequences decoding, with the same arithmetic of
    time as `Server.step` for each; requests that end leave. Stops before the step that would be planned at `until`, or
    that may admit. Returns whether any ran.

    In a step: the clock, the sums of the work, the policy's hooks. Once for all of them: the requests' progress, their
    tokens, their pages.
    """
    decoding = _all_decoding(server.scheduler, server.now)
    if not decoding or server.awaits_admission():
        return False
    remaining = {request.number: request.max_new - request.num_sampled for request in decoding}
    most = _steps_with_pages(server.scheduler, decoding)
    if most < LEAST_STEPS:
        return False
    steps, reads = _run(server, decoding, remaining, most, until)
    _bring_up_to_date(server, [r for r in decoding if remaining[r.number] > len(reads)], steps, reads, remaining)
    return True


def _all_decoding(scheduler: Scheduler, now: float) -> list[Request]:
    """Running requests in the order of the plan, without those whose last token is on its way; none if one of them has
    a prompt to compute, or not all fit into a step."""
    if type(scheduler.policy).order not in STATIC_ORDERS:
        return []
    decoding = []
    for request in scheduler.policy.order(scheduler.running, now):
        sampled = request.num_sampled
        if sampled >= request.max_new:
            continue
        if not sampled or len(request.prompt) + sampled - request.num_computed != 1:
            return []
        decoding.append(request)
    return decoding if len(decoding) <= scheduler.limits.max_tokens else []


def _steps_with_pages(scheduler: Scheduler, decoding: Sequence[Request]) -> int:
    """Steps for which the free pages suffice, whoever leaves meanwhile; at most the longest output."""
    computed = np.array([request.num_computed for request in decoding])
    remaining = np.array([request.max_new - request.num_sampled for request in decoding])
    pages = np.array([len(request.pages) for request in decoding])
    free, page_size = scheduler.allocator.num_free, scheduler.limits.page_size

    def suffice(steps: int) -> bool:
        wanted = -(-(computed + np.minimum(steps, remaining)) // page_size)
        return int((wanted - pages).sum()) <= free

    low, high = 0, int(remaining.max())
    if suffice(high):
        return high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if suffice(middle) else (low, middle)
    return low


def _run(
    server: Server, decoding: Sequence[Request], remaining: Mapping[int, int], most: int, until: float
) -> tuple[int, list[float]]:
    """Steps that ran, and when the tokens of each were read: of all but the last one, if steps overlap."""
    leaving: dict[int, list[Request]] = {}
    for request in decoding:
        leaving.setdefault(remaining[request.number], []).append(request)
    batch = Decoding(decoding, server.ranks, server.cost.lora.pads)
    tells_policy = type(server.scheduler.policy).stepped is not Policy.stepped
    reads: list[float] = []
    steps = 0
    while steps < most and batch.requests:
        if steps:
            if server.now >= until:
                break
            server.deliver()
            if server.awaits_admission():
                break
        server.scheduler.schedule_decode(batch.sequences() if tells_policy else (), server.now)
        read = server.run_decode(batch.work)
        steps += 1
        batch.next_step()
        if steps in leaving:
            batch.leave(leaving[steps])
        if read is not None:
            reads.append(read)
            server.end(_completed(leaving.get(len(reads), ()), reads))
    return steps, reads


def _completed(requests: Sequence[Request], reads: Sequence[float]) -> Sequence[Request]:
    """The same requests, with all of their output."""
    for request in requests:
        request.num_computed += len(reads)
        request.num_sampled += len(reads)
        request.output += cast(Sequence[int], reads)
    return requests


def _bring_up_to_date(
    server: Server, requests: Sequence[Request], steps: int, reads: Sequence[float], remaining: Mapping[int, int]
) -> None:
    """Progress and pages of those that go on, or whose last token is on its way."""
    scheduler = server.scheduler
    needed = []
    for request in requests:
        done = min(steps, remaining[request.number])
        request.num_computed += done
        request.num_sampled += done
        request.output += cast(Sequence[int], reads)
        needed.append(scheduler.pages_for(request.num_computed) - len(request.pages))
    pages = scheduler.allocator.allocate(sum(needed), PageKind.KV).tolist()
    taken = 0
    for request, count in zip(requests, needed, strict=True):
        request.pages += pages[taken : taken + count]
        taken += count
    in_last = [request for request in requests if remaining[request.number] >= steps]
    server.leave_in_flight([ScheduledSequence(r, r.num_computed - 1, 1, True) for r in in_last])
