"""What the systems serve."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from slora_jax.metrics import RequestRecord


@dataclass(frozen=True)
class WorkloadRequest:
    """A request to come: arrival in seconds from the start, a prompt of token ids, an adapter by name (None: the base
    model), and how many tokens it generates, greedily, whatever they are. after: for a closed loop, the number of an
    earlier request; this one arrives `arrival` seconds after that one ended, answered or aborted."""

    arrival: float
    prompt: tuple[int, ...]
    adapter: str | None
    output: int
    after: int | None = None


Workload = Sequence[WorkloadRequest]
"""Requests in order of arrival, but for those that follow others; a record's `request_id` is its request's number."""


@dataclass(frozen=True)
class Run:
    """What a system did with a workload: a record and the generated tokens of each request, in the workload's order."""

    records: list[RequestRecord]
    tokens: list[list[int]]


Done = Callable[[], object]
"""Called at the end of each request: the progress bar."""
