"""Ageing: a bound on waiting, put around any policy."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from slora_jax.errors import ConfigError
from slora_jax.scheduling.plan import ScheduledSequence
from slora_jax.scheduling.policy import Batch, Policy
from slora_jax.scheduling.queue import RequestQueue
from slora_jax.scheduling.request import Request


@dataclass
class Ageing(Policy):
    """The `inner` policy, except that requests older than `bound` seconds come first, oldest first, waiting or running.
    If `inner` holds an aged request back (a hard cap on adapters), or it was preempted a moment ago and its newest
    token is not read yet, nobody is admitted until it may be.

    Theorem. Let request r still wait for its first admission when it is `bound` seconds old, and let D be the requests
    that run then or wait and are older than r. If
      (1) no step takes longer than t seconds,
      (2) no request of D needs more than s steps when it alone decides (it has the first claim on tokens and pages:
          s = ceil(tokens / max_tokens) prefill steps, one step per output token, two until its end is read),
      (3) every request fits into the pool alone (checked on arrival), and the adapters of D and r are in memory (with
          prefetch, in the pool: while one is on its way there, others go ahead),
      (4) `inner` lets someone in when nothing runs,
    then r is admitted (or given up by `inner`, or cancelled) within bound + (2 |D| + 1) * s * t seconds of its arrival,
    whatever arrives after it.

    Proof. From then on r is yielded before every younger request, and the scheduler lets nobody overtake one that does
    not fit, so until r is admitted only members of D are. In each step a member of D runs first in `order`, or nothing
    runs and the oldest waiting one is admitted by (3) and (4). The first is never preempted, and so ends within s steps
    unless an older, aged one is admitted and takes its place. That one is the oldest of all that are left in D, as the
    queue is tried oldest first, so it keeps its place to its end. So the time until D is empty splits into at most |D|
    spells in first place that end with a finished request, and at most one displaced spell before each of these, all
    of at most s steps. When D is empty, r fits.

    bound: seconds since arrival. 0 is first come, first served.
    """

    inner: Policy
    bound: float

    def __post_init__(self) -> None:
        if not isinstance(self.inner, Policy):
            raise ConfigError(f"Ageing.inner={self.inner!r}: must be a policy")
        if not 0 <= self.bound < math.inf:
            raise ConfigError(f"Ageing.bound={self.bound!r}: must be a number of seconds, at least 0")

    def order(self, requests: Sequence[Request], now: float) -> Iterable[Request]:
        aged = list(self._aged(requests, now))
        if not aged:
            return self.inner.order(requests, now)
        return aged + [r for r in self.inner.order(requests, now) if not self._is_aged(r, now)]

    def select(self, waiting: RequestQueue, batch: Batch, now: float) -> Iterator[Request]:
        for request in self._aged(waiting, now):
            held_back = not any(True for _ in self.inner.select(RequestQueue([request]), batch, now))
            if held_back or request.in_flight:
                return
            yield request
        for request in self.inner.select(waiting, batch, now):
            if not self._is_aged(request, now):
                yield request

    def upcoming(self, waiting: RequestQueue, batch: Batch, now: float) -> Iterator[Request]:
        yield from self._aged(waiting, now)
        for request in self.inner.upcoming(waiting, batch, now):
            if not self._is_aged(request, now):
                yield request

    def aborts(self, waiting: RequestQueue, batch: Batch, now: float) -> Iterable[tuple[Request, str]]:
        return self.inner.aborts(waiting, batch, now)

    def arrived(self, request: Request, waiting: RequestQueue) -> None:
        self.inner.arrived(request, waiting)

    def admitted(self, request: Request) -> None:
        self.inner.admitted(request)

    def stepped(self, sequences: Sequence[ScheduledSequence]) -> None:
        self.inner.stepped(sequences)

    def _is_aged(self, request: Request, now: float) -> bool:
        return now - request.metrics.arrival >= self.bound

    def _aged(self, requests: Iterable[Request], now: float) -> Iterator[Request]:
        """`requests` are in order of arrival, so these are the first."""
        for request in requests:
            if not self._is_aged(request, now):
                return
            yield request
