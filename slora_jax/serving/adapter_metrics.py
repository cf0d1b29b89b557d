"""Counters by adapter for Prometheus, with a bounded number of label values."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

from prometheus_client import Metric
from prometheus_client.core import CounterMetricFamily
from prometheus_client.registry import Collector

from slora_jax.engine import RequestOutput
from slora_jax.serving.observation import queue_seconds

BASE, OTHER = "_base", "_other"
"""Labels of requests without an adapter, and of those whose adapter has no label of its own."""

FAMILIES = (
    ("slora_adapter_requests", "Finished requests by adapter."),
    ("slora_adapter_generated_tokens", "Generated tokens of finished requests by adapter."),
    ("slora_adapter_queue_seconds", "Time that finished requests waited to be admitted, by adapter."),
)


@dataclass
class _Counts:
    """In the order of `FAMILIES`. created: unix seconds, by which a scraper tells a series that began anew."""

    values: list[float] = field(default_factory=lambda: [0.0] * len(FAMILIES))
    created: float = field(default_factory=time.time)

    def add(self, values: list[float]) -> None:
        self.values = [old + new for old, new in zip(self.values, values, strict=True)]


class AdapterMetrics(Collector):
    """The first `most` adapters that requests use have a label of their own, the others share `_other`.

    A label is free again when its adapter is unloaded. Its counts go over to `_other` then, so that no sum over
    adapters ever goes down; under the same name, a later adapter's begin at 0 with a later `_created`.
    """

    def __init__(self, most: int, is_registered: Callable[[str], bool]) -> None:
        """is_registered: `AdapterStore.has`; what finishes after its adapter was unloaded takes no label."""
        self._most, self._is_registered = most, is_registered
        self._counts = {BASE: _Counts(), OTHER: _Counts()}

    def finished(self, output: RequestOutput) -> None:
        values = [1.0, float(len(output.token_ids)), queue_seconds(output) or 0.0]
        self._counts[self._label(output.adapter)].add(values)

    def forget(self, adapter: str) -> None:
        """The name was unloaded."""
        counts = None if adapter in (BASE, OTHER) else self._counts.pop(_text(adapter), None)
        if counts is not None:
            self._counts[OTHER].add(counts.values)

    def collect(self) -> Iterator[Metric]:
        counts = list(self._counts.items())  # finished() may add to it meanwhile
        for index, (name, text) in enumerate(FAMILIES):
            family = CounterMetricFamily(name, text, labels=["adapter"])
            for label, one in counts:
                family.add_metric([label], one.values[index], created=one.created)
            yield family

    def _label(self, adapter: str | None) -> str:
        if adapter is None:
            return BASE
        label = _text(adapter)
        if adapter in (BASE, OTHER):
            return OTHER
        if label not in self._counts:
            if len(self._counts) - 2 >= self._most or not self._is_registered(adapter):
                return OTHER
            self._counts[label] = _Counts()
        return label


def _text(adapter: str) -> str:
    """A name that UTF-8 can hold: those of folders may have bytes that are not text."""
    return adapter.encode("utf-8", "backslashreplace").decode()
