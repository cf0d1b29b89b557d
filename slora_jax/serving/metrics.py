"""What a server tells Prometheus. Every name begins with `slora_` and ends with its unit."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping

import numpy as np
from prometheus_client import (
    CONTENT_TYPE_LATEST,
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    Metric,
    ProcessCollector,
    generate_latest,
)
from prometheus_client.core import HistogramMetricFamily
from prometheus_client.registry import Collector
from prometheus_client.utils import floatToGoString

from slora_jax.adapters import Tier
from slora_jax.engine import RequestOutput
from slora_jax.scheduling import FinishReason
from slora_jax.serving.adapter_metrics import AdapterMetrics
from slora_jax.serving.compilations import Compilations
from slora_jax.serving.engine_metrics import EngineMetrics
from slora_jax.serving.observation import EngineSnapshot, queue_seconds

INTER_TOKEN_SECONDS = (
    *(0.001, 0.0025, 0.005, 0.0075, 0.01, 0.015, 0.02, 0.03, 0.04, 0.05, 0.075, 0.1, 0.15, 0.25, 0.5, 1.0, 2.5),
)
FIRST_TOKEN_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 20.0, 40.0, 80.0)
REQUEST_SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 20.0, 40.0, 80.0, 160.0, 320.0)
TOKENS = tuple(2**n for n in range(18))
METHODS = ("GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS")


class ServerMetrics:
    """All metrics of one server, in a registry of its own.

    Make it before the engine, so that the engine's compilations are counted. `finished`, `forget`, `http`, `refused`,
    `fault` and `set_ready` are the event loop's; `render` may be called from any thread.
    """

    def __init__(
        self,
        snapshot: Callable[[], EngineSnapshot | None],
        tiers: Callable[[], Mapping[str, Tier]] = dict,
        *,
        is_registered: Callable[[str], bool] = lambda adapter: True,
        most_adapters: int = 100,
    ) -> None:
        """snapshot: the engine's newest, None before there is one. tiers, is_registered: `AdapterStore.tiers` and
        `has`. most_adapters: that have counters of their own."""
        self._registry = registry = CollectorRegistry()
        self._compilations = Compilations()
        self._adapters = AdapterMetrics(most_adapters, is_registered)
        self._intervals = InterTokenHistogram()
        for collector in (EngineMetrics(snapshot, tiers, self._compilations), self._adapters, self._intervals):
            registry.register(collector)
        ProcessCollector(registry=registry)

        def histogram(name: str, text: str, buckets: tuple[float, ...], labels: tuple[str, ...] = ()) -> Histogram:
            return Histogram(name, text, labels, registry=registry, buckets=buckets)

        def counter(name: str, text: str, labels: tuple[str, ...] = ()) -> Counter:
            return Counter(name, text, labels, registry=registry)

        self._first_token = histogram(
            "slora_time_to_first_token_seconds", "From a request's arrival to its first token.", FIRST_TOKEN_SECONDS
        )
        self._request = histogram(
            "slora_request_seconds", "From a request's arrival to its last token.", REQUEST_SECONDS
        )
        self._queue = histogram("slora_queue_seconds", "From a request's arrival to its admission.", REQUEST_SECONDS)
        self._prompt_tokens = histogram("slora_request_prompt_tokens", "Tokens of a finished request's prompt.", TOKENS)
        self._generated_tokens = histogram("slora_request_generated_tokens", "Tokens a finished request got.", TOKENS)
        self._requests = counter("slora_requests_total", "Finished requests by why they ended.", ("finish_reason",))
        for reason in FinishReason:
            self._requests.labels(reason.value)  # from 0, so that the first one shows in a rate
        self._prompt_total = counter("slora_prompt_tokens_total", "Tokens of finished requests' prompts.")
        self._cached_total = counter(
            "slora_cached_prompt_tokens_total", "Of these, tokens that the prefix cache held at admission."
        )
        self._http_requests = counter(
            "slora_http_requests_total", "HTTP responses, streams when they end.", ("route", "method", "status")
        )
        self._http_seconds = histogram(
            "slora_http_request_seconds", "Duration of HTTP requests.", REQUEST_SECONDS, ("route", "method")
        )
        self._refused = counter(
            "slora_requests_refused_total", "Requests refused before they came to the engine.", ("reason",)
        )
        self._faults = counter("slora_engine_faults_total", "Faults of the engine, which ended requests.")
        self._ready = Gauge("slora_ready", "1 when the server accepts requests, else 0.", registry=registry)

    def finished(self, output: RequestOutput) -> None:
        """A request has ended, whatever the reason."""
        metrics, prompt = output.metrics, len(output.prompt_token_ids)
        self._requests.labels(output.finish_reason.value).inc()
        self._prompt_tokens.observe(prompt)
        self._generated_tokens.observe(len(output.token_ids))
        self._prompt_total.inc(prompt)
        self._cached_total.inc(metrics.cached_tokens)
        for histogram, seconds in (
            (self._first_token, metrics.first_token_latency),
            (self._request, metrics.latency),
            (self._queue, queue_seconds(output)),
        ):
            if seconds is not None:
                histogram.observe(seconds)
        self._intervals.observe(output.token_times)
        self._adapters.finished(output)

    def forget(self, adapter: str) -> None:
        """An adapter was unloaded: its label is free for another."""
        self._adapters.forget(adapter)

    def http(self, route: str | None, method: str, status: int, seconds: float) -> None:
        """A response has been sent. route: the template ("/v1/models/{model}"), None if none matched."""
        route, method = route or "unmatched", method if method in METHODS else "other"
        self._http_requests.labels(route, method, str(status)).inc()
        self._http_seconds.labels(route, method).observe(seconds)

    def refused(self, reason: str) -> None:
        """A request was refused. reason: one of a fixed few, not a message."""
        self._refused.labels(reason).inc()

    def fault(self) -> None:
        """The engine failed in a step."""
        self._faults.inc()

    def set_ready(self, ready: bool) -> None:
        """Returns whether the server accepts requests. From the first time on that it does, nothing should compile."""
        self._ready.set(ready)
        if ready:
            self._compilations.ready()

    def render(self) -> tuple[bytes, str]:
        """All metrics in Prometheus' text format, and its content type."""
        return generate_latest(self._registry), CONTENT_TYPE_LATEST

    def close(self) -> None:
        """Stops counting compilations. May be called twice."""
        self._compilations.close()


class InterTokenHistogram(Collector):
    """Times between a request's tokens. There are thousands a second, so a request's are counted at once."""

    def __init__(self) -> None:
        self._bounds = np.array(INTER_TOKEN_SECONDS)
        self._counts = np.zeros(self._bounds.size + 1, np.int64)
        self._sum = 0.0

    def observe(self, times: list[float]) -> None:
        """times: when a request's tokens came, in seconds of any clock."""
        if len(times) > 1:
            intervals = np.diff(times)
            at = np.searchsorted(self._bounds, intervals)  # a bound counts as below it, as Prometheus has it
            self._counts = self._counts + np.bincount(at, minlength=self._counts.size)
            self._sum += float(intervals.sum())

    def collect(self) -> Iterator[Metric]:
        below = np.cumsum(self._counts).tolist()
        bounds = [*map(floatToGoString, INTER_TOKEN_SECONDS), "+Inf"]
        family = HistogramMetricFamily("slora_inter_token_seconds", "Time between two tokens of a finished request.")
        family.add_metric([], list(zip(bounds, below, strict=True)), self._sum)
        yield family
