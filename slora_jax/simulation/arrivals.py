"""When requests arrive: at times of their own (an open loop), or after others have ended (a closed loop)."""

from __future__ import annotations

import heapq
import math
from collections.abc import Iterator, Sequence
from typing import Protocol


class ToCome(Protocol):
    """A request of a workload. arrival: seconds from the start. after: None, or the number of an earlier request of the
    workload; it then arrives `arrival` seconds after that one's end, of whatever kind."""

    @property
    def arrival(self) -> float: ...

    @property
    def after(self) -> int | None: ...


class Arrivals:
    """Requests on their way to one server, by number, whose times of arrival are known; others become known as those
    before them end. Times are seconds from the start."""

    def __init__(self, workload: Sequence[ToCome] = ()) -> None:
        """All of a workload; `Arrivals.of_each` divides it among several servers."""
        self._known: list[tuple[float, int]] = []  # a heap
        self._followers: dict[int, list[tuple[Arrivals, float, int]]] = {}
        for number, request in enumerate(workload):
            self._expect(number, request)

    @classmethod
    def of_each(cls, workload: Sequence[ToCome], server_of: Sequence[int], servers: int) -> list[Arrivals]:
        """server_of: of each request. An end at any server is heard by all."""
        each = [cls() for _ in range(servers)]
        for arrivals in each:
            arrivals._followers = each[0]._followers
        for number, (request, server) in enumerate(zip(workload, server_of, strict=True)):
            each[server]._expect(number, request)
        return each

    def __bool__(self) -> bool:
        """Whether any time is known."""
        return bool(self._known)

    @property
    def next(self) -> float:
        """The first of the known times; infinity if there is none."""
        return self._known[0][0] if self._known else math.inf

    def until(self, now: float) -> Iterator[tuple[int, float]]:
        """Takes those that have arrived, with their times: in order of arrival, at the same time by number."""
        known = self._known
        while known and known[0][0] <= now:
            time, number = heapq.heappop(known)
            yield number, time

    def ended(self, number: int, now: float) -> None:
        """Request `number` was answered or given up at `now`."""
        for arrivals, seconds, follower in self._followers.pop(number, ()):
            heapq.heappush(arrivals._known, (now + seconds, follower))

    def _expect(self, number: int, request: ToCome) -> None:
        if request.after is None:
            heapq.heappush(self._known, (request.arrival, number))
        else:
            self._followers.setdefault(request.after, []).append((self, request.arrival, number))
