"""The figures of a run, by their names in results and plots."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import fields

from slora_jax.metrics import RequestRecord, serving_metrics
from slora_jax.metrics.distribution import Distribution

AXIS_LABELS = {
    "throughput": "throughput (requests/s)",
    "token_throughput": "output tokens per second",
    "latency": "mean latency (s)",
    "first_token_latency": "mean first-token latency (s)",
    "first_token_latency_p99": "p99 of first-token latency (s)",
    "inter_token_latency_p99": "p99 of inter-token latency (s)",
    "attainment": "SLO attainment",
    "satisfaction": "user satisfaction",
    "inter_token_latency": "mean inter-token latency (s)",
    "adapter_loads": "adapters loaded",
    "disk_reads": "adapters read from disk",
    "preemptions": "requests preempted",
    "prefix_hit_tokens": "prompt tokens from the cache",
    "dollars_per_million_tokens": "dollars per million output tokens",
}
"""Of the figures that plots show; others are labelled by their names."""

_SPREAD = ("latency", "first_token_latency", "inter_token_latency", "queue_time")


def run_figures(
    records: Sequence[RequestRecord], start: float, slo_seconds: float, dollars_per_hour: float | None = None
) -> dict[str, float | None]:
    """Returns requests or tokens per second, seconds, and shares, as `ServingMetrics` defines them; None: of no
    requests. A distribution gives its mean by its own name, and percentiles: `latency`, `latency_p50`, `latency_p99`.

    Args:
      start: seconds on the records' clock.
      dollars_per_hour: the device's price, paid from the start to the last end, for `dollars_per_million_tokens` of
        output.
    """
    metrics = serving_metrics(records, start=start, slo_seconds=slo_seconds)
    found: dict[str, float] = {}
    for field in fields(metrics):
        value = getattr(metrics, field.name)
        if isinstance(value, Distribution):
            found[field.name] = value.mean
            if field.name in _SPREAD:
                found |= {f"{field.name}_{p}": getattr(value, p) for p in ("p50", "p90", "p99")}
        elif isinstance(value, int | float):
            found[field.name] = value
    if dollars_per_hour is not None:
        found["dollars_per_million_tokens"] = dollars_per_hour / 3600 / metrics.token_throughput * 1e6
    return {name: value if math.isfinite(value) else None for name, value in found.items()}


def latencies(prefix: str, records: Sequence[RequestRecord]) -> dict[str, float | None]:
    """Returns first-token and inter-token latencies of some of a run's requests, in seconds, with names that begin with
    `prefix`."""
    first = Distribution.of(record.first_token_latency or 0.0 for record in records)
    gaps = Distribution.of(gap for record in records for gap in record.inter_token_latencies.tolist())
    found = {
        "first_token_latency": first.mean,
        "first_token_latency_p50": first.p50,
        "first_token_latency_p99": first.p99,
        "inter_token_latency_p50": gaps.p50,
        "inter_token_latency_p99": gaps.p99,
        "inter_token_latency_max": gaps.maximum,
    }
    return {f"{prefix}{name}": value if math.isfinite(value) else None for name, value in found.items()}
