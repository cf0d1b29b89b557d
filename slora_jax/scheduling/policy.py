"""The policy interface, which orders and aborts requests, and the two simplest policies."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from slora_jax.scheduling.plan import ScheduledSequence
from slora_jax.scheduling.queue import RequestQueue
from slora_jax.scheduling.request import Request


@dataclass(frozen=True)
class Batch:
    """Live view of the running requests: it includes requests admitted while a policy's selection is consumed.

    Attributes:
      running: in order of arrival.
      adapters: number of running requests by adapter digest.
    """

    running: Sequence[Request]
    adapters: Mapping[str, int]


class Policy:
    """First come, first served; other policies override the methods in which they differ.

    A policy ranks requests; the scheduler does the arithmetic of pages, slots and tokens. A policy may keep state,
    updated by the notifications `arrived`, `admitted` and `stepped`.

    Attributes:
      takes_priority: whether the policy heeds `Request.priority`; other policies refuse requests that have one.
    """

    takes_priority: bool = False

    def order(self, requests: Sequence[Request], now: float) -> Iterable[Request]:
        """Returns the requests by precedence, most urgent first.

        Called in every step with all running requests to allocate tokens and pages; the last one is preempted first.
        Also the order of admission unless `select` is overridden. At least one request must keep its precedence until
        it finishes, or the scheduler may make no progress.

        Args:
          requests: in order of arrival.
          now: seconds on the engine's clock.
        """
        return requests

    def select(self, waiting: RequestQueue, batch: Batch, now: float) -> Iterable[Request]:
        """Yields the waiting requests that may be admitted now, most urgent first.

        Consumed lazily up to the first request that does not fit. When a generator resumes, the request that it yielded
        has been admitted (`batch` includes it and `admitted` was called), or skipped because its adapter is not ready.
        `waiting` is unchanged. Requests not yielded stay queued. If nothing is running, yield at least one. It must not
        change the policy's state, because it is also called with parts of the queue. A request may be yielded twice.
        """
        return self.order(waiting, now)

    def upcoming(self, waiting: RequestQueue, batch: Batch, now: float) -> Iterable[Request]:
        """Yields the waiting requests in their likely order of admission, now and later, to prefetch their adapters.
        Only the first few are consumed. It must not change the policy's state."""
        return self.select(waiting, batch, now)

    def aborts(self, waiting: RequestQueue, batch: Batch, now: float) -> Iterable[tuple[Request, str]]:
        """Returns waiting requests to abort now, each with a reason for the user. Called first in every step. The
        scheduler ignores requests that already have a token."""
        return ()

    def arrived(self, request: Request, waiting: RequestQueue) -> None:
        """Called before a new request joins `waiting`."""

    def admitted(self, request: Request) -> None:
        """Called after a request is admitted, and again after each readmission following a preemption."""

    def stepped(self, sequences: Sequence[ScheduledSequence]) -> None:
        """Called with the sequences of each planned step."""


class Fcfs(Policy):
    """First come, first served. The latest arrival is preempted first, so the oldest request always finishes."""


class Lcfs(Policy):
    """Last come, first served, the baseline of the paper's figure 10. Under overload the wait is unbounded (see
    `Ageing`)."""

    def order(self, requests: Sequence[Request], now: float) -> Iterable[Request]:
        return reversed(requests)
