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

HALF_LIFE = 600.0
"""Seconds after which a request counts half in an adapter's activity."""
BUSIER = 2.0
"""An adapter takes the label of one whose activity is at most its own divided by this."""
CHANGE_SECONDS = 10.0
"""Shortest time between two such changes: each is a new series for Prometheus."""

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
      activity: requests, each halved every `HALF_LIFE`, at the end of the last one.
    """

    requests: int = 0
    prompt_tokens: int = 0
    generated_tokens: int = 0
    queued: int = 0
    queue_seconds: float = 0.0
    last_queue_seconds: float | None = None
    last_used: float | None = None
    created: float = field(default_factory=time.time)
    activity: float = 0.0

    def add(self, output: RequestOutput) -> None:
        """Adds a request that finished now."""
        self.requests += 1
        self.prompt_tokens += len(output.prompt_token_ids)
        self.generated_tokens += len(output.token_ids)
        now = time.time()
        self.activity, self.last_used = self.activity_at(now) + 1, now
        waited = queue_seconds(output)
        if waited is not None:
            self.queued += 1
            self.queue_seconds += waited
            self.last_queue_seconds = waited

    def activity_at(self, now: float) -> float:
        """Returns the activity at a time in unix seconds."""
        return 0.0 if self.last_used is None else self.activity * 0.5 ** ((now - self.last_used) / HALF_LIFE)


UNUSED = Usage()
"""Usage of an adapter that no finished request used."""


class AdapterTally(Collector):
    """Usage by registered adapter and by label. The event loop calls it; `collect` may run in any thread.

    `most` adapters have a label each, the others share `_other`. The first ones in use get labels; later, an adapter
    that is `BUSIER` takes the label's place of the least busy one. Then, and when an adapter is unloaded, the lost
    label's counts move to `_other`, so no sum over labels ever decreases; a label that comes back starts at 0 with a
    later `_created`.
    """

    def __init__(self, most: int, is_registered: Callable[[str], bool]) -> None:
        """Starts empty.

        Args:
          is_registered: `AdapterStore.has`. A request that finishes after its adapter was unloaded counts as `_other`.
        """
        self._most, self._is_registered = most, is_registered
        self._by_name: dict[str, Usage] = {}
        self._by_label = {BASE: Usage(), OTHER: Usage()}
        self._changed = -CHANGE_SECONDS  # time of the last change of labels, by the monotonic clock

    def finished(self, output: RequestOutput) -> None:
        """Counts a request that has ended."""
        name = output.adapter
        is_registered = name is not None and self._is_registered(name)
        if name is not None and is_registered:
            self._by_name.setdefault(name, Usage()).add(output)
        label = self._label(name, is_registered)  # may replace the mapping
        self._by_label[label].add(output)

    def forget(self, name: str) -> None:
        """Drops an adapter that was unloaded."""
        self._by_name.pop(name, None)
        label = _text(name)
        if label not in (BASE, OTHER) and label in self._by_label:
            self._relabel(label, {})

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
            if not is_registered or (len(self._by_label) - 2 >= self._most and not self._displace(name, label)):
                return OTHER
            self._by_label.setdefault(label, Usage())
        return label

    def _displace(self, name: str, label: str) -> bool:
        """Gives `label` the place of the least busy one, if that is much less busy. Returns whether it did."""
        now = time.time()
        if time.monotonic() - self._changed < CHANGE_SECONDS:
            return False
        activities = {one: usage.activity_at(now) for one, usage in self._by_label.items() if one not in (BASE, OTHER)}
        least, activity = min(activities, key=activities.__getitem__), self._by_name[name].activity_at(now)
        if activity < BUSIER * activities[least]:
            return False
        self._changed = time.monotonic()
        # The request that ends now is added to the new label's activity by the caller.
        self._relabel(least, {label: Usage(activity=activity - 1, last_used=now)})
        return True

    def _relabel(self, label: str, added: dict[str, Usage]) -> None:
        """Drops a label, whose counts move to `_other`, and adds others. A scrape sees all of the change or none."""
        usage, other = self._by_label[label], self._by_label[OTHER]
        merged = replace(other, **{c: getattr(other, c) + getattr(usage, c) for c in FAMILIES})
        kept = {one: usage for one, usage in self._by_label.items() if one != label}
        self._by_label = kept | {OTHER: merged} | added


def _text(name: str) -> str:
    """Returns a name as UTF-8 can hold it: a folder's name may have bytes that are not text."""
    return name.encode("utf-8", "backslashreplace").decode()
