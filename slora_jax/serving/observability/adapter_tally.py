"""Totals over finished requests by adapter, for `/v1/adapters` and, with a bounded number of labels, Prometheus."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace

from prometheus_client import Metric
from prometheus_client.core import CounterMetricFamily
from prometheus_client.registry import Collector

from slora_jax.engine import RequestOutput

BASE, OTHER = "_base", "_other"
"""Labels of requests without an adapter, and of adapters without a label of their own."""

FAMILIES = {
    "requests": "Finished requests by adapter.",
    "generated_tokens": "Generated tokens of finished requests by adapter.",
    "queue_seconds": "Time that finished requests waited to be admitted, by adapter.",
}
"""Metric name without the prefix `slora_adapter_`, which is a field of `Usage` -> help text."""


def queue_seconds(output: RequestOutput) -> float | None:
    """Returns how long a request waited to be admitted; None if it never was."""
    metrics = output.metrics
    return None if metrics.admitted is None else metrics.admitted - metrics.arrival


@dataclass
class Usage:
    """Totals over finished requests.

    Attributes:
      queued: requests that were admitted.
      queue_seconds: time that these waited in all; last_queue_seconds: the latest of them.
      last_used: unix seconds of the last request's end.
      created: unix seconds at which counting began; a scraper recognizes a restarted series by it.
    """

    requests: int = 0
    prompt_tokens: int = 0
    generated_tokens: int = 0
    queued: int = 0
    queue_seconds: float = 0.0
    last_queue_seconds: float | None = None
    last_used: float | None = None
    created: float = field(default_factory=time.time)

    def add(self, output: RequestOutput) -> None:
        """Adds a request that finished now."""
        self.requests += 1
        self.prompt_tokens += len(output.prompt_token_ids)
        self.generated_tokens += len(output.token_ids)
        self.last_used = time.time()
        waited = queue_seconds(output)
        if waited is not None:
            self.queued += 1
            self.queue_seconds += waited
            self.last_queue_seconds = waited


UNUSED = Usage()
"""Usage of an adapter that no finished request used."""


class AdapterTally(Collector):
    """Usage by registered adapter and by label. The event loop calls it; `collect` may run in any thread.

    The first `most` adapters in use get a label each, the others share `_other`. Unloading an adapter frees its label
    and moves the label's counts to `_other`, so no sum over labels ever decreases; a later adapter of the same name
    starts at 0 with a later `_created`.
    """

    def __init__(self, most: int, is_registered: Callable[[str], bool]) -> None:
        """Starts empty.

        Args:
          is_registered: `AdapterStore.has`. A request that finishes after its adapter was unloaded counts as `_other`.
        """
        self._most, self._is_registered = most, is_registered
        self._by_name: dict[str, Usage] = {}
        self._by_label = {BASE: Usage(), OTHER: Usage()}

    def finished(self, output: RequestOutput) -> None:
        """Counts a request that has ended."""
        name = output.adapter
        is_registered = name is not None and self._is_registered(name)
        if name is not None and is_registered:
            self._by_name.setdefault(name, Usage()).add(output)
        self._by_label[self._label(name, is_registered)].add(output)

    def forget(self, name: str) -> None:
        """Drops an adapter that was unloaded."""
        self._by_name.pop(name, None)
        label, other = _text(name), self._by_label[OTHER]
        if label not in (BASE, OTHER) and (usage := self._by_label.get(label)) is not None:
            merged = replace(other, **{c: getattr(other, c) + getattr(usage, c) for c in FAMILIES})
            kept = {one: usage for one, usage in self._by_label.items() if one != label}
            self._by_label = kept | {OTHER: merged}  # a scrape sees all of the change or none

    def of(self, name: str) -> Usage:
        """Returns the usage of a registered adapter."""
        return self._by_name.get(name, UNUSED)

    def collect(self) -> Iterator[Metric]:
        usages = list(self._by_label.items())  # the event loop may add a label during the scrape
        for counter, text in FAMILIES.items():
            family = CounterMetricFamily(f"slora_adapter_{counter}", text, labels=["adapter"])
            for label, usage in usages:
                family.add_metric([label], getattr(usage, counter), created=usage.created)
            yield family

    def _label(self, name: str | None, is_registered: bool) -> str:
        if name is None:
            return BASE
        label = _text(name)
        if label in (BASE, OTHER):
            return OTHER
        if label not in self._by_label:
            if len(self._by_label) - 2 >= self._most or not is_registered:
                return OTHER
            self._by_label[label] = Usage()
        return label


def _text(name: str) -> str:
    """Returns a name as UTF-8 can hold it: a folder's name may have bytes that are not text."""
    return name.encode("utf-8", "backslashreplace").decode()
