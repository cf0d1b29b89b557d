"""The figures of a run, by the names that results and plots have."""

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
    """Requests or tokens per second, seconds, and shares, as `ServingMetrics` defines them. A distribution gives its
    mean by its own name, and its percentiles: `latency`, `latency_p50`, `latency_p99`. None: of no requests.

    start: seconds on the records' clock. dollars_per_hour: the device's price, paid from the start to the last end;
    with it, `dollars_per_million_tokens` of output are given as well.
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
