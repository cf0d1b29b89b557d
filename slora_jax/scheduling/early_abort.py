"""S-LoRA's early abort: under overload, give up what is too late and serve the newest that can still be in time."""

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
    """The largest l such that the latest l requests all get their first token within `slo` seconds of their arrival
    when served from `now` on in order of arrival, the j-th of them (from 1) at `now + margin + (j - 1) * seconds_each`.

    arrivals: seconds, ascending. All requests cost the same and later ones have later deadlines, so to give up the
    oldest at each violation loses as few as any choice could (Moore-Hodgson), and what is left is in time.
    """
    kept = 0
    for arrival in arrivals:
        kept += 1
        if now + margin + (kept - 1) * seconds_each > arrival + slo:
            kept -= 1  # the oldest goes, and the others move up by one
    return kept


@dataclass
class EarlyAbort(Policy):
    """Early abort for a first-token objective (paper section 4 and appendix B; figure 10 "Abort").

    slo: seconds from arrival to first token. margin: seconds from admission to first token (the code's 0.5).

    rule="paper", the text's intent: estimate the latest requests that can be served within the objective, and serve
    them in order of arrival. A request that can no longer be in time is given up. While the queue does not empty, the
    rate of admissions is measured (over the last `slo` seconds, fading exponentially; the next admission is counted as
    if it came now, so that no news is not taken for a standstill), and what is older than the latest set servable at
    that rate (`latest_servable`) is given up as well; the newest request is never. Theorem B.1: when l can be served
    and the reward does not increase with latency, serving the latest l is optimal.

    rule="code", the released `AbortReqQueue`: only requests with `wait + margin >= slo` are given up. The others are
    served newest first when `rate >= size`, else oldest first, where at each attempt rate = int(0.7 * (queue - queue
    after the last admission) + 0.3 * rate), and at each admission size = max(int(0.7 * admitted + 0.3 * size), 1).
    The code attempts every tenth step and when requests come or go, this one every step.
    """

    slo: float = 6.0
    rule: str = "paper"
    margin: float = 0.5
    _admitted: int = field(default=0, init=False, repr=False)  # since the last call of `aborts`
    # The paper's rule
    _last: float = field(default=-math.inf, init=False, repr=False)  # when `aborts` was last called
    _busy: float = field(default=0.0, init=False, repr=False)  # seconds with someone left waiting, fading
    _served: float = field(default=0.0, init=False, repr=False)  # admissions in them, fading alike
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
        """Estimated seconds between admissions while requests wait (rule "paper"); 0 when nothing is known."""
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
        """Admissions of the last step and the time since count only if they left someone waiting."""
        if waiting and waiting[0].metrics.arrival <= self._last:
            elapsed = now - self._last
            fade = math.exp(-elapsed / self.slo)
            self._busy = self._busy * fade + elapsed
            self._served = self._served * fade + self._admitted
        else:
            self._busy = self._served = 0.0
        self._last = now

    def _not_servable(self, waiting: RequestQueue, now: float) -> Iterator[tuple[Request, str]]:
        if not waiting:
            return
        each = self.seconds_each
        keep = len(waiting)
        if now + self.margin + (keep - 1) * each > waiting[0].metrics.arrival + self.slo:  # not all, for certain
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
                f"early abort: one request is admitted in {each:.3g} s and {len(waiting) - late} wait, of which the "
                f"latest {keep} can have their first token within slo={self.slo:g} s",
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
