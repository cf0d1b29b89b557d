"""S-LoRA's early abort: under overload, aborts late requests and serves the newest that can meet the objective."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice

from slora_jax.errors import ConfigError
from slora_jax.scheduling.plan import ScheduledSequence
from slora_jax.scheduling.policy import Batch, Policy
from slora_jax.scheduling.queue import RequestQueue
from slora_jax.scheduling.request import Request

RULES = ("paper", "code")


def latest_servable(arrivals: Sequence[float], now: float, slo: float, margin: float, seconds_each: float) -> int:
    """Returns the largest l for which the latest l requests all meet the objective when served in order of arrival.

    The j-th request served (from 1) gets its first token at `now + margin + (j - 1) * seconds_each`. All requests cost
    the same and deadlines are in order of arrival, so dropping the oldest at each violation drops as few as possible
    (Moore-Hodgson).

    Args:
      arrivals: seconds, ascending.
      now: seconds, same clock.
      slo: seconds from arrival to first token.
      margin: seconds from admission to first token.
      seconds_each: seconds between admissions.
    """
    servable = 0
    for arrival in arrivals:
        servable += 1
        if now + margin + (servable - 1) * seconds_each > arrival + slo:
            servable -= 1  # drop the oldest; the others are served one place earlier
    return servable


@dataclass
class EarlyAbort(Policy):
    """Early abort for a first-token latency objective (paper section 4 and appendix B; figure 10 "Abort").

    rule="paper", the paper's text: estimates the latest requests that can meet the objective and serves them in order
    of arrival. Aborts requests that can no longer meet it. While the queue stays non-empty, it also measures the
    admission rate (exponentially weighted with time constant `slo`; the next admission counts as if it happened now, so
    that the estimate stays finite before the first one) and aborts requests older than the latest set servable at that
    rate (`latest_servable`), but never the newest request. Theorem B.1: when l requests can be served and the reward
    does not increase with latency, serving the latest l is optimal.

    rule="code", the released `AbortReqQueue`: aborts only requests with `wait + margin >= slo`. The others are served
    newest first if `rate >= size`, else oldest first. At each attempt rate = int(0.7 * (queue - queue after the last
    admission) + 0.3 * rate); at each admission size = max(int(0.7 * admitted + 0.3 * size), 1). The released code
    attempts every tenth step and when requests arrive or finish; this one attempts every step.

    Attributes:
      slo: seconds from arrival to first token.
      rule: "paper" or "code".
      margin: seconds from admission to first token; 0.5 in the released code.
    """

    slo: float = 6.0
    rule: str = "paper"
    margin: float = 0.5
    _admitted: int = field(default=0, init=False, repr=False)  # since the last call of `aborts`
    # The paper's rule
    _last: float = field(default=-math.inf, init=False, repr=False)  # when `aborts` was last called
    _busy: float = field(default=0.0, init=False, repr=False)  # seconds with a non-empty queue, decayed
    _served: float = field(default=0.0, init=False, repr=False)  # admissions in that time, decayed
    # The code's rule
    _rate: int = field(default=1, init=False, repr=False)
    _size: int = field(default=1, init=False, repr=False)
    _left: int = field(default=0, init=False, repr=False)  # queue after the last admission
    _queue: int = field(default=0, init=False, repr=False)  # queue after this step's aborts

    def __post_init__(self) -> None:
        if not 0 < self.slo < math.inf:
            raise ConfigError(f"EarlyAbort.slo={self.slo!r}: must be a positive number of seconds")
        if not 0 <= self.margin < self.slo:
            raise ConfigError(f"EarlyAbort.margin={self.margin!r}: must be in [0, slo={self.slo}) seconds")
        if self.rule not in RULES:
            raise ConfigError(f"EarlyAbort.rule={self.rule!r}: must be one of {RULES}")

    @property
    def seconds_each(self) -> float:
        """Estimated seconds between admissions while requests wait (rule "paper"); 0 without a measurement."""
        return self._busy / (self._served + 1)

    def select(self, waiting: RequestQueue, batch: Batch, now: float) -> Iterable[Request]:
        newest_first = self.rule == "code" and self._rate >= self._size
        return reversed(waiting) if newest_first else waiting

    def aborts(self, waiting: RequestQueue, batch: Batch, now: float) -> Iterable[tuple[Request, str]]:
        if self.rule == "paper":
            self._measure(waiting, now)
            yield from self._not_servable(waiting, now)
        else:
            self._rate = int(0.7 * (len(waiting) - self._left) + 0.3 * self._rate)
            self._queue = len(waiting)
            for aborted in self._too_late(waiting, now):
                self._queue -= 1
                yield aborted
        self._admitted = 0

    def admitted(self, request: Request) -> None:
        self._admitted += 1

    def stepped(self, sequences: Sequence[ScheduledSequence]) -> None:
        if self.rule == "code" and self._admitted:
            self._left = self._queue - self._admitted
            self._size = max(int(0.7 * self._admitted + 0.3 * self._size), 1)
            self._admitted = 0

    def _measure(self, waiting: RequestQueue, now: float) -> None:
        """Updates the admission rate if a request has been waiting since the last step; otherwise resets it."""
        if waiting and waiting[0].metrics.arrival <= self._last:
            elapsed = now - self._last
            decay = math.exp(-elapsed / self.slo)
            self._busy = self._busy * decay + elapsed
            self._served = self._served * decay + self._admitted
        else:
            self._busy = self._served = 0.0
        self._last = now

    def _not_servable(self, waiting: RequestQueue, now: float) -> Iterator[tuple[Request, str]]:
        if not waiting:
            return
        each = self.seconds_each
        keep = len(waiting)
        if now + self.margin + (keep - 1) * each > waiting[0].metrics.arrival + self.slo:  # not all are servable
            most = min(keep, 1 + int((self.slo - self.margin) / each)) if each else keep
            latest = [request.metrics.arrival for request in islice(reversed(waiting), most)][::-1]
            keep = max(latest_servable(latest, now, self.slo, self.margin, each), 1)
        late = 0
        for aborted in self._too_late(waiting, now):
            late += 1
            yield aborted
        for request in islice(waiting, late, len(waiting) - keep):
            yield (
                request,
                f"early abort: one request is admitted in {each:.3g} s and {len(waiting) - late} are waiting; only the "
                f"latest {keep} can get their first token within slo={self.slo:g} s",
            )

    def _too_late(self, waiting: RequestQueue, now: float) -> Iterator[tuple[Request, str]]:
        for request in waiting:
            waited = now - request.metrics.arrival
            if waited + self.margin < self.slo:
                return
            yield (
                request,
                f"early abort: waited {waited:.3g} s; its first token would not come within slo={self.slo:g} s",
            )
