"""The engine's figures for Prometheus, from its newest snapshot."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping

from prometheus_client import Metric
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.registry import Collector

from slora_jax.adapters import Tier
from slora_jax.serving.compilations import Compilations
from slora_jax.serving.observation import EngineSnapshot

STATS_COUNTERS = {
    "engine_steps": ("steps", "Steps that the engine dispatched."),
    "computed_tokens": ("tokens_computed", "Tokens computed: of prompts, and one a step of each decoding request."),
    "generated_tokens": ("tokens_generated", "Output tokens read, those of unfinished requests included."),
    "preemptions": ("preemptions", "Running requests whose pages were taken, to be computed again later."),
    "aborts": ("aborts", "Requests that the policy aborted before their first token."),
    "prefix_hit_tokens": ("prefix_hit_tokens", "Tokens of admitted requests that were in the prefix cache."),
    "prefix_evictions": ("prefix_evictions", "Pages of the prefix cache that were evicted."),
    "adapter_loads": ("adapter_loads", "Adapters that were given pages in the pool."),
    "adapter_hits": ("adapter_hits", "Uses that found their adapter in the pool from before."),
    "adapter_evictions": ("adapter_evictions", "Adapters that left the pool."),
    "prefetch_hits": ("prefetch_hits", "Prefetched adapters that had landed when their request could start."),
    "prefetches_wasted": ("prefetches_wasted", "Prefetched adapters that were not used."),
    "upload_bytes": ("upload_bytes", "Bytes of adapters copied to the device."),
}
"""Name without `slora_` and `_total` -> field of `EngineStats`, help."""

STATS_GAUGES = {
    "running_requests": ("running", "Requests that are running."),
    "waiting_requests": ("waiting", "Requests that wait to be admitted."),
    "registered_adapters": ("registered_adapters", "Names of adapters."),
    "uploads_in_flight": ("uploads_in_flight", "Adapters on their way to the device."),
    "upload_in_flight_bytes": ("upload_bytes_in_flight", "Bytes of adapters on their way to the device."),
}
"""Name without `slora_` -> field of `EngineStats`, help."""


class EngineMetrics(Collector):
    """Asked at each scrape; costs the engine nothing. Before there is a snapshot, only what needs none."""

    def __init__(
        self,
        snapshot: Callable[[], EngineSnapshot | None],
        tiers: Callable[[], Mapping[str, Tier]],
        compilations: Compilations,
    ) -> None:
        """snapshot: the newest. tiers: `AdapterStore.tiers`."""
        self._snapshot, self._tiers, self._compilations = snapshot, tiers, compilations

    def collect(self) -> Iterator[Metric]:
        yield CounterMetricFamily(
            "slora_compilations", "Programs compiled since the server started.", self._compilations.total
        )
        yield CounterMetricFamily(
            "slora_compilations_after_ready",
            "Programs compiled since the server was ready: each lets everybody wait; 0 is right.",
            self._compilations.after_ready,
        )
        yield CounterMetricFamily(
            "slora_compilation_seconds", "Seconds spent on compiling.", self._compilations.seconds
        )
        snapshot = self._snapshot()
        if snapshot is not None:
            yield from self._engine(snapshot)

    def _engine(self, snapshot: EngineSnapshot) -> Iterator[Metric]:
        stats, store = snapshot.stats, snapshot.store
        for name, (field, text) in STATS_COUNTERS.items():
            yield CounterMetricFamily(f"slora_{name}", text, getattr(stats, field))
        for name, (field, text) in STATS_GAUGES.items():
            yield GaugeMetricFamily(f"slora_{name}", text, getattr(stats, field))
        yield CounterMetricFamily("slora_spill_writes", "Adapters written to spill files.", store.spill_writes)
        yield CounterMetricFamily("slora_spill_reads", "Adapters read back from spill files.", store.spill_reads)
        yield GaugeMetricFamily("slora_host_adapter_bytes", "Bytes of adapters in host memory.", store.resident_bytes)
        yield GaugeMetricFamily(
            "slora_snapshot_age_seconds", "Time since the engine was observed: grows when it is stuck.",
            time.monotonic() - snapshot.time,
        )  # fmt: skip
        pages = GaugeMetricFamily("slora_pool_pages", "Pages of the unified pool by what they hold.", labels=["kind"])
        for kind, count in snapshot.pages.items():
            pages.add_metric([kind], count)
        yield pages
        adapters = GaugeMetricFamily("slora_adapters", "Adapters (contents) by where they are.", labels=["state"])
        for state, count in snapshot.states(self._tiers()).items():
            adapters.add_metric([state], count)
        yield adapters
