"""The policy interface: the order of requests when not all fit, and which to abort. And the two simplest policies."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from slora_jax.scheduling.plan import ScheduledSequence
from slora_jax.scheduling.queue import RequestQueue
from slora_jax.scheduling.request import Request


@dataclass(frozen=True)
class Batch:
    """The running requests, live: while a policy's selection is consumed, those that are admitted are added.

    Attributes:
      running: in order of arrival.
      adapters: number of running requests by the digest of the adapter that they use.
    """

    running: Sequence[Request]
    adapters: Mapping[str, int]


class Policy:
    """First come, first served; other policies override the methods in which they differ.

    A policy decides on requests only. It sees no page id and no device array; the scheduler does the arithmetic of
    pages, slots and tokens. The last three methods notify it; a policy may keep state of its own.
    """

    def order(self, requests: Sequence[Request], now: float) -> Iterable[Request]:
        """Returns the requests by precedence, the most urgent first. `requests` are in order of arrival, `now` is in
        seconds on the engine's clock. Called in every step with all running requests, to allocate tokens and pages; the
        last one is preempted first. Also the order of admission, unless `select` says otherwise.

        Some request must keep its precedence for long enough to finish, or none may ever finish.
        """
        return requests

    def select(self, waiting: RequestQueue, batch: Batch, now: float) -> Iterable[Request]:
        """Yields the waiting requests that may be admitted now, the most urgent first.

        Consumed lazily, up to the first that does not fit: none overtakes it. A generator sees the admission of a
        request when it is resumed: `batch` has grown and `admitted` was called; `waiting` stays as it is until the end.
        Requests not yielded stay queued. If nothing is running, yield at least one. It must not change state, as it is
        also called with parts of the queue. A request may be yielded twice.
        """
        return self.order(waiting, now)

    def upcoming(self, waiting: RequestQueue, batch: Batch, now: float) -> Iterable[Request]:
        """Yields the waiting requests in the order in which they are likely to be admitted, now and later; their
        adapters are prefetched. Consumed lazily, from the first on and never far. It must not change state either."""
        return self.select(waiting, batch, now)

    def aborts(self, waiting: RequestQueue, batch: Batch, now: float) -> Iterable[tuple[Request, str]]:
        """Returns waiting requests to abort now, each with the reason for its user. Called first in every step.
        Requests that have a token already continue nevertheless."""
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
