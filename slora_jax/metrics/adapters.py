"""Metrics per adapter: queue time, loads, evictions and time in the pool."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass

from slora_jax.metrics.distribution import Distribution
from slora_jax.metrics.record import RequestRecord


@dataclass(frozen=True)
class PoolStay:
    """One stay of an adapter in the pool, from upload to eviction.

    Attributes:
      adapter: name used by the request that it was loaded for (a digest may have several names), or the first digits of
        the digest if no name is known.
      digest: digest of the adapter's content.
      pages: number of its pages.
      loaded: seconds on the engine's clock; None if it was resident before the recording began.
      evicted: likewise; None if it is resident at the end.
    """

    adapter: str
    digest: str
    pages: int
    loaded: float | None
    evicted: float | None = None


@dataclass(frozen=True)
class AdapterMetrics:
    """Metrics of one adapter in one run.

    Attributes:
      requests, completed: number of its requests, and of those completed.
      queue_time: seconds, over its requests.
      loads, evictions: number of uploads to the pool and of evictions.
      resident_seconds: time in the pool.
      page_seconds: time in the pool times number of pages.
    """

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
    """Computes the metrics of each adapter, by name; None stands for requests without an adapter. `start` and `end`
    bound the pool metrics, in seconds on the engine's clock."""
    requests: dict[str | None, list[RequestRecord]] = defaultdict(list)
    in_pool: dict[str | None, list[PoolStay]] = defaultdict(list)
    for record in records:
        requests[record.adapter].append(record)
    for stay in stays:
        in_pool[stay.adapter].append(stay)
    return {
        name: _metrics_of(requests[name], in_pool[name], start, end)
        for name in sorted({*requests, *in_pool}, key=lambda name: (name is not None, name or ""))
    }


def _metrics_of(records: list[RequestRecord], stays: list[PoolStay], start: float, end: float) -> AdapterMetrics:
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
