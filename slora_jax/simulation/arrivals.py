"""Arrival times of requests: given (open loop), or relative to the end of other requests (closed loop)."""

from __future__ import annotations

import heapq
import math
from collections.abc import Iterator, Sequence
from typing import Protocol


class WorkloadRequest(Protocol):
    """A request of a workload.

    Attributes:
      arrival: seconds from the start or, with `after`, from the end of that request (answered or aborted).
      after: number of an earlier request of the workload, or None.
    """

    @property
    def arrival(self) -> float: ...

    @property
    def after(self) -> int | None: ...


class Arrivals:
    """Future requests of one server, by number, in order of arrival.

    An arrival that depends on another request becomes known when that request ends. Times are seconds from the start.
    """

    def __init__(self, workload: Sequence[WorkloadRequest] = ()) -> None:
        """Takes a whole workload; `of_each` divides one among several servers."""
        self._known: list[tuple[float, int]] = []  # heap of (time, number)
        self._followers: dict[int, list[tuple[Arrivals, float, int]]] = {}
        for number, request in enumerate(workload):
            self._expect(number, request)

    @classmethod
    def of_each(cls, workload: Sequence[WorkloadRequest], server_of: Sequence[int], servers: int) -> list[Arrivals]:
        """Divides a workload among servers; a request may follow one at another server.

        Args:
          server_of: each request's server, below `servers`.
        """
        each = [cls() for _ in range(servers)]
        for arrivals in each:
            arrivals._followers = each[0]._followers
        for number, (request, server) in enumerate(zip(workload, server_of, strict=True)):
            each[server]._expect(number, request)
        return each

    def __bool__(self) -> bool:
        """Returns whether any arrival time is known."""
        return bool(self._known)

    @property
    def next(self) -> float:
        """The earliest known arrival time; infinity if none is known."""
        return self._known[0][0] if self._known else math.inf

    def until(self, now: float) -> Iterator[tuple[int, float]]:
        """Removes and yields (number, time) of the requests that have arrived, by time, then number."""
        known = self._known
        while known and known[0][0] <= now:
            time, number = heapq.heappop(known)
            yield number, time

    def ended(self, number: int, now: float) -> None:
        """Schedules the requests that follow request `number`, which was answered or aborted at `now`."""
        for arrivals, seconds, follower in self._followers.pop(number, ()):
            heapq.heappush(arrivals._known, (now + seconds, follower))

    def _expect(self, number: int, request: WorkloadRequest) -> None:
        if request.after is None:
            heapq.heappush(self._known, (request.arrival, number))
        else:
            self._followers.setdefault(request.after, []).append((self, request.arrival, number))
