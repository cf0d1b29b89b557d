"""The policy seam: who comes first when not everyone fits, and who is given up. And the two simplest policies."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from slora_jax.scheduling.plan import ScheduledSequence
from slora_jax.scheduling.queue import RequestQueue
from slora_jax.scheduling.request import Request


@dataclass(frozen=True)
class Batch:
    """What runs now, live: while a policy's selection is consumed, it grows by the requests that are admitted.

    running: in order of arrival. adapters: digest of each adapter in use -> running requests that use it.
    """

    running: Sequence[Request]
    adapters: Mapping[str, int]


class Policy:
    """First come, first served, and the seam of every other rule: a policy overrides what it does differently.

    A policy decides on requests only. It sees no page id and no device array; the scheduler does the arithmetic of
    pages, slots and tokens. The last three methods tell it what happens; what it remembers is its own.
    """

    def order(self, requests: Sequence[Request], now: float) -> Iterable[Request]:
        """The requests by precedence, the most urgent first; `requests` are in order of arrival, `now` is in seconds on
        the engine's clock. Asked every step of the running ones (all of them), to share out tokens and pages; the last
        of these is the first to be preempted. Also the order of admission, unless `select` says otherwise.

        Something must keep its precedence for long enough to finish, or nothing may ever finish.
        """
        return requests

    def select(self, waiting: RequestQueue, batch: Batch, now: float) -> Iterable[Request]:
        """The waiting requests that may be admitted now, the most urgent first.

        Consumed lazily, up to the first that does not fit: none overtakes it. A generator sees the admission of what
        it yielded when it is resumed: `batch` has grown and `admitted` was called; `waiting` stays as it is until the
        end. Who is left out waits for a later step; if nothing runs, someone must be let in. It changes no state, as it
        may be asked of other queues than the whole one. A request may be yielded twice.
        """
        return self.order(waiting, now)

    def upcoming(self, waiting: RequestQueue, batch: Batch, now: float) -> Iterable[Request]:
        """The waiting requests in the order in which they are likely to be admitted, now and later: whose adapters are
        brought ahead. Consumed lazily, from the first on and never far. It changes no state either."""
        return self.select(waiting, batch, now)

    def aborts(self, waiting: RequestQueue, batch: Batch, now: float) -> Iterable[tuple[Request, str]]:
        """Waiting requests to give up now, each with the reason for its user. Asked first in every step. Requests that
        have a token already go on nevertheless."""
        return ()

    def arrived(self, request: Request, waiting: RequestQueue) -> None:
        """A new request is about to join `waiting`."""

    def admitted(self, request: Request) -> None:
        """A request has just left the queue for the batch; after a preemption, once more."""

    def stepped(self, sequences: Sequence[ScheduledSequence]) -> None:
        """A step is planned and will compute these."""


class Fcfs(Policy):
    """First come, first served. The latest arrival gives way, so the oldest request always runs to its end."""


class Lcfs(Policy):
    """Last come, first served, the baseline of the paper's figure 10: the newest request has every precedence, and
    under overload the oldest wait without bound (see `Ageing`)."""

    def order(self, requests: Sequence[Request], now: float) -> Iterable[Request]:
        return reversed(requests)
