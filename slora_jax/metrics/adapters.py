"""Metrics by adapter: how long its requests queue, how often it comes to the pool, how long it stays."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass

from slora_jax.metrics.distribution import Distribution
from slora_jax.metrics.record import RequestRecord


@dataclass(frozen=True)
class PoolStay:
    """One stay of an adapter in the pool: from the step that uploads it to its eviction, in seconds on the engine's
    clock; `evicted=None` if it is there to the end.

    adapter: the name in the request that it was loaded for (content may have several), or the digest's beginning where
    no name is known. loaded=None: it was there before the recording began, so this stay is no load.
    """

    adapter: str
    digest: str
    pages: int
    loaded: float | None
    evicted: float | None = None


@dataclass(frozen=True)
class AdapterMetrics:
    """One adapter in one run. queue_time: seconds, over its requests. loads: uploads to the pool; evictions: times it
    had to leave. resident_seconds: time in the pool; page_seconds: that times its pages."""

    requests: int
    completed: int
    queue_time: Distribution
    loads: int
    evictions: int
    resident_seconds: float
    page_seconds: float


def adapter_metrics(
    records: Iterable[RequestRecord], stays: Iterable[PoolStay], start: float, end: float
) -> dict[str | None, AdapterMetrics]:
    """By adapter name, None being requests without one; time in the pool counts between `start` and `end`."""
    requests: dict[str | None, list[RequestRecord]] = defaultdict(list)
    in_pool: dict[str | None, list[PoolStay]] = defaultdict(list)
    for record in records:
        requests[record.adapter].append(record)
    for stay in stays:
        in_pool[stay.adapter].append(stay)
    return {
        name: _of_one(requests[name], in_pool[name], start, end)
        for name in sorted({*requests, *in_pool}, key=lambda name: (name is not None, name or ""))
    }


def _of_one(records: list[RequestRecord], stays: list[PoolStay], start: float, end: float) -> AdapterMetrics:
    seconds = [_overlap(stay, start, end) for stay in stays]
    return AdapterMetrics(
        requests=len(records),
        completed=sum(r.completed for r in records),
        queue_time=Distribution.of(r.queue_time for r in records),
        loads=sum(s.loaded is not None and start <= s.loaded <= end for s in stays),
        evictions=sum(s.evicted is not None and start <= s.evicted <= end for s in stays),
        resident_seconds=sum(seconds),
        page_seconds=sum(s * stay.pages for s, stay in zip(seconds, stays, strict=True)),
    )


def _overlap(stay: PoolStay, start: float, end: float) -> float:
    first = start if stay.loaded is None else max(stay.loaded, start)
    last = end if stay.evicted is None else min(stay.evicted, end)
    return max(0.0, last - first)
