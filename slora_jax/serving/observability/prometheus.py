"""The server's metrics for Prometheus. Every name begins with `slora_` and ends with its unit."""

from __future__ import annotations

import itertools
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import jax
from prometheus_client import (
    CONTENT_TYPE_LATEST,
    CollectorRegistry,
    Counter,
    Gauge,
    Metric,
    ProcessCollector,
    generate_latest,
)
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.registry import Collector

from slora_jax.adapters import Tier
from slora_jax.engine import RequestOutput
from slora_jax.scheduling import FinishReason
from slora_jax.serving.observability.adapter_tally import AdapterTally, queue_seconds
from slora_jax.serving.observability.histogram import FINE_SECONDS, Histogram, HistogramMetric
from slora_jax.serving.observability.snapshot import EngineSnapshot

INTER_TOKEN_SECONDS = (
    *(0.001, 0.0025, 0.005, 0.0075, 0.01, 0.015, 0.02, 0.03, 0.04, 0.05, 0.075, 0.1, 0.15, 0.25, 0.5, 1.0, 2.5),
)
FIRST_TOKEN_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 20.0, 40.0, 80.0)
REQUEST_SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 20.0, 40.0, 80.0, 160.0, 320.0)
TOKENS = tuple(2.0**n for n in range(18))
METHODS = ("GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS")

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


class ServerMetrics:
    """All metrics of one server, in its own registry.

    Create it before the engine, so that the engine's compilations are counted. The event loop calls the methods;
    `render` may run in any thread.

    Attributes:
      adapters: usage by adapter.
      num_finished: requests that have ended.
      first_token, inter_token: latencies in seconds, in buckets fine enough for percentiles.
    """

    def __init__(
        self,
        snapshot: Callable[[], EngineSnapshot | None],
        tiers: Callable[[], Mapping[str, Tier]] = dict,
        *,
        is_registered: Callable[[str], bool] = lambda adapter: True,
        most_adapters: int = 100,
    ) -> None:
        """Creates the metrics.

        Args:
          snapshot: returns the engine's newest snapshot, None before the first.
          tiers: `AdapterStore.tiers`.
          is_registered: `AdapterStore.has`.
          most_adapters: adapters that have a label of their own.
        """
        self._registry = CollectorRegistry()
        self._compilations = Compilations()
        self.adapters = AdapterTally(most_adapters, is_registered)
        self.num_finished = 0
        for collector in (_EngineCollector(snapshot, tiers, self._compilations), self.adapters):
            self._registry.register(collector)
        ProcessCollector(registry=self._registry)
        self.first_token = self._histogram(
            "time_to_first_token_seconds",
            "From a request's arrival to its first token.",
            FIRST_TOKEN_SECONDS,
            FINE_SECONDS,
        )
        self.inter_token = self._histogram(
            "inter_token_seconds", "Time between two tokens of a finished request.", INTER_TOKEN_SECONDS, FINE_SECONDS
        )
        self._request = self._histogram(
            "request_seconds", "From a request's arrival to its last token.", REQUEST_SECONDS
        )
        self._queue = self._histogram("queue_seconds", "From a request's arrival to its admission.", REQUEST_SECONDS)
        self._prompt_tokens = self._histogram("request_prompt_tokens", "Tokens of a finished request's prompt.", TOKENS)
        self._generated_tokens = self._histogram("request_generated_tokens", "Tokens a finished request got.", TOKENS)
        self._requests = self._counter("requests", "Finished requests by why they ended.", "finish_reason")
        for reason in FinishReason:
            self._requests.labels(reason.value)  # from 0, so that a rate shows the first one
        self._prompt_total = self._counter("prompt_tokens", "Tokens of finished requests' prompts.")
        self._cached_total = self._counter(
            "cached_prompt_tokens", "Of these, tokens that the prefix cache held at admission."
        )
        self._http_requests = self._counter(
            "http_requests", "HTTP responses, streams when they end.", "route", "method", "status"
        )
        self._http_seconds = HistogramMetric(
            "slora_http_request_seconds", "Duration of HTTP requests.", REQUEST_SECONDS, ("route", "method")
        )
        self._registry.register(self._http_seconds)
        self._refused = self._counter("requests_refused", "Requests refused before they came to the engine.", "reason")
        self._faults = self._counter("engine_faults", "Faults of the engine, which ended requests.")
        self._ready = Gauge("slora_ready", "1 when the server accepts requests, else 0.", registry=self._registry)

    def finished(self, output: RequestOutput) -> None:
        """Counts a request that has ended, for whatever reason."""
        metrics, prompt = output.metrics, len(output.prompt_token_ids)
        self.num_finished += 1
        self._requests.labels(output.finish_reason.value).inc()
        self._prompt_tokens.add([prompt])
        self._generated_tokens.add([len(output.token_ids)])
        self._prompt_total.inc(prompt)
        self._cached_total.inc(metrics.cached_tokens)
        for histogram, seconds in (
            (self.first_token, metrics.first_token_latency),
            (self._request, metrics.latency),
            (self._queue, queue_seconds(output)),
        ):
            if seconds is not None:
                histogram.add([seconds])
        if len(output.token_times) > 1:
            self.inter_token.add([later - one for one, later in itertools.pairwise(output.token_times)])
        self.adapters.finished(output)

    def http(self, route: str | None, method: str, status: int, seconds: float) -> None:
        """Counts a response that was sent.

        Args:
          route: the route's template ("/v1/models/{name}"); None if no route matched.
        """
        route, method = route or "unmatched", method if method in METHODS else "other"
        self._http_requests.labels(route, method, str(status)).inc()
        self._http_seconds.labelled(route, method).add([seconds])

    def refused(self, reason: str) -> None:
        """Counts a refused request. `reason` is one of a fixed few codes, not a message."""
        self._refused.labels(reason).inc()

    def fault(self) -> None:
        """Counts a failure of the engine."""
        self._faults.inc()

    def set_ready(self, ready: bool) -> None:
        """Records whether the server accepts requests. After the first True, nothing should compile."""
        self._ready.set(ready)
        if ready:
            self._compilations.ready()

    def render(self) -> tuple[bytes, str]:
        """Returns all metrics in Prometheus' text format, and its content type."""
        return generate_latest(self._registry), CONTENT_TYPE_LATEST

    def close(self) -> None:
        """Stops counting compilations. May be called twice."""
        self._compilations.close()

    def _histogram(self, name: str, text: str, buckets: Sequence[float], fine: Iterable[float] = ()) -> Histogram:
        metric = HistogramMetric(f"slora_{name}", text, buckets, fine=fine)
        self._registry.register(metric)
        return metric.labelled()

    def _counter(self, name: str, text: str, *labels: str) -> Counter:
        return Counter(f"slora_{name}_total", text, labels, registry=self._registry)


class Compilations:
    """Programs that XLA compiled (or loaded from the persistent cache) in this process since this object was created.
    A server that compiles while it serves delays every request."""

    def __init__(self) -> None:
        self.total = 0
        self.seconds = 0.0
        self._lock = threading.Lock()
        self._before_ready: int | None = None
        self._is_listening = True
        jax.monitoring.register_event_duration_secs_listener(self._listen)

    @property
    def after_ready(self) -> int:
        """Programs compiled after the first call of `ready`: 0 is right."""
        return 0 if self._before_ready is None else self.total - self._before_ready

    def ready(self) -> None:
        """Marks the end of the warm-up. Further calls change nothing."""
        if self._before_ready is None:
            self._before_ready = self.total

    def close(self) -> None:
        """Stops counting. May be called twice."""
        if self._is_listening:
            self._is_listening = False
            jax.monitoring.unregister_event_duration_listener(self._listen)

    def _listen(self, event: str, duration_secs: float, **_: str | int) -> None:
        if event == "/jax/core/compile/backend_compile_duration":
            with self._lock:  # programs are compiled by several threads
                self.total += 1
                self.seconds += duration_secs


class _EngineCollector(Collector):
    """Reads the newest snapshot at each scrape. Before the first snapshot, only compilations are reported."""

    def __init__(
        self,
        snapshot: Callable[[], EngineSnapshot | None],
        tiers: Callable[[], Mapping[str, Tier]],
        compilations: Compilations,
    ) -> None:
        self._snapshot, self._tiers, self._compilations = snapshot, tiers, compilations

    def collect(self) -> Iterator[Metric]:
        compiled = self._compilations
        for name, text, value in (
            ("compilations", "Programs compiled since the server started.", compiled.total),
            (
                "compilations_after_ready",
                "Programs compiled since the server was ready: each delays every request; 0 is right.",
                compiled.after_ready,
            ),
            ("compilation_seconds", "Seconds spent on compiling.", compiled.seconds),
        ):
            yield CounterMetricFamily(f"slora_{name}", text, value)
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
        age = time.monotonic() - snapshot.time
        yield GaugeMetricFamily(
            "slora_snapshot_age_seconds", "Time since the engine was observed: grows when it is stuck.", age
        )
        yield _by_label("slora_pool_pages", "Pages of the unified pool by what they hold.", "kind", snapshot.pages)
        states = snapshot.states(self._tiers())
        yield _by_label("slora_adapters", "Adapters (contents) by where they are.", "state", states)


def _by_label(name: str, text: str, label: str, values: Mapping[Any, int]) -> GaugeMetricFamily:
    family = GaugeMetricFamily(name, text, labels=[label])
    for key, value in values.items():
        family.add_metric([key], value)
    return family
