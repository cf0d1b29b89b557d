"""Ageing: bounds the waiting time under any policy."""

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

    While the oldest aged request cannot be admitted, because `inner` holds it back (a hard cap on adapters) or because
    it was just preempted and its newest token is not read yet, no request is admitted.

    Theorem. Let request r still wait for its first admission at age `bound`, and let D be the requests that are running
    at that moment, or waiting and older than r. If
      (1) no step takes longer than t seconds,
      (2) each request of D finishes within s steps when it has first claim on tokens and pages
          (s = ceil(prefilled tokens / max_num_batched_tokens) + output tokens + 2, as its end is read late),
      (3) every request fits into the pool alone (checked on arrival), and the adapters of D and r are in host memory
          (with prefetch: in the pool, because other requests are admitted while an adapter is uploaded),
      (4) `inner` yields at least one request when nothing is running,
    then r is admitted (or aborted by `inner`, or cancelled) within bound + (2 |D| + 1) * s * t seconds of its arrival,
    regardless of later arrivals.

    Proof. From age `bound` on, r is yielded before every younger request, and the scheduler admits no request past one
    that does not fit, so until r is admitted only members of D are admitted. In each step a member of D is first in
    `order`, or nothing is running and the oldest waiting request is admitted by (3) and (4). The first in `order` is
    never preempted, so it finishes within s steps unless an older aged request is admitted and displaces it. The queue
    is tried oldest first, so the displacing request is the oldest remaining member of D and stays first until it
    finishes. The time until D is empty therefore consists of at most |D| periods that end with a finished request, each
    preceded by at most one displaced period, all of at most s steps. When D is empty, r fits.

    Attributes:
      inner: the policy for requests younger than `bound`.
      bound: seconds since arrival; 0 gives first come, first served.
    """

    inner: Policy
    bound: float

    def __post_init__(self) -> None:
        if not isinstance(self.inner, Policy):
            raise ConfigError(f"Ageing.inner={self.inner!r}: must be a policy")
        if not 0 <= self.bound < math.inf:
            raise ConfigError(f"Ageing.bound={self.bound!r}: must be a number of seconds, at least 0")

    @property
    def takes_priority(self) -> bool:  # type: ignore[override]
        return self.inner.takes_priority

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
        """Yields the aged requests, a prefix of `requests` because these are in order of arrival."""
        for request in requests:
            if not self._is_aged(request, now):
                return
            yield request
