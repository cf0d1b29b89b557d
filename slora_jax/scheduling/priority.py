"""Admission by the priorities of requests."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from operator import attrgetter

from slora_jax.scheduling.policy import Policy
from slora_jax.scheduling.request import Request


class Priority(Policy):
    """The lowest `Request.priority` first; among equals, first come, first served.

    If pages run out, the running request with the highest number is preempted first. Under overload, requests with high
    numbers may wait without bound (see `Ageing`).
    """

    takes_priority = True

    def order(self, requests: Sequence[Request], now: float) -> Iterable[Request]:
        return sorted(requests, key=_priority)  # stable


_priority = attrgetter("priority")
