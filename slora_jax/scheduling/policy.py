"""The policy seam: who comes first when not everyone fits."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from slora_jax.scheduling.request import Request


class Policy(Protocol):
    """Pure decisions over queues. A policy sees no page id and no device array; the scheduler does the arithmetic."""

    def order(self, requests: Sequence[Request], now: float) -> Sequence[Request]:
        """The requests by precedence, the most urgent first; `requests` are in order of arrival, `now` is in seconds on
        the engine's clock. Asked of the waiting ones to admit (a prefix worth trying will do) and of the running ones
        to share out tokens and pages; the last of these is the first to be preempted.

        Something must keep its precedence for long enough to finish, or nothing may ever finish.
        """
        ...


class Fcfs:
    """First come, first served. The latest arrival gives way, so the oldest request always runs to its end."""

    def order(self, requests: Sequence[Request], now: float) -> Sequence[Request]:
        return requests
