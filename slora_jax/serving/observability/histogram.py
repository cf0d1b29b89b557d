"""One histogram for every measured value: Prometheus' buckets and the live page's percentiles read the same counts."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Sequence

import numpy as np
from prometheus_client import Metric
from prometheus_client.core import HistogramMetricFamily
from prometheus_client.registry import Collector
from prometheus_client.utils import floatToGoString

FINE_SECONDS = np.geomspace(1e-5, 1e4, 400)
"""Upper bounds for percentiles of latencies: each is 5.3 % above the one before."""


class Histogram:
    """Counts values by size: constant memory and cost, however many values. One thread adds, any thread reads.

    Attributes:
      bounds: upper bounds, inclusive and ascending, `[n]`.
      counts: values per bucket, int64 `[n + 1]`; the last bucket has no upper bound. `add` replaces the array.
      total: sum of the values.
      created: unix seconds.
    """

    def __init__(self, bounds: Iterable[float]) -> None:
        self.bounds = np.unique(np.fromiter(bounds, float))
        self.counts = np.zeros(self.bounds.size + 1, np.int64)
        self.total = 0.0
        self.created = time.time()

    def add(self, values: Sequence[float] | np.ndarray) -> None:
        """Counts values, in the unit of the bounds."""
        self.counts = self.counts + np.bincount(np.searchsorted(self.bounds, values), minlength=self.counts.size)
        self.total += float(np.sum(values))

    def at_most(self, counts: np.ndarray, bounds: Sequence[float]) -> list[int]:
        """Returns how many of `counts` are at most each of these bounds, which must be among the histogram's own."""
        return np.cumsum(counts)[np.searchsorted(self.bounds, bounds)].tolist()

    def percentiles(self, counts: np.ndarray, shares: Sequence[float] = (0.5, 0.95)) -> list[float | None]:
        """Returns the values that these shares of `counts` do not exceed (nearest rank, to the middle of its bucket);
        None where nothing was counted."""
        below = np.cumsum(counts)
        if not below[-1]:
            return [None] * len(shares)
        ranks = [max(1, int(np.ceil(share * below[-1]))) for share in shares]
        middles = np.sqrt(np.append(self.bounds[0], self.bounds) * np.append(self.bounds, self.bounds[-1]))
        return [float(f"{middles[int(np.searchsorted(below, rank))]:.3g}") for rank in ranks]


class HistogramMetric(Collector):
    """A metric of Prometheus: one histogram for each combination of label values."""

    def __init__(
        self, name: str, text: str, buckets: Sequence[float], labels: Sequence[str] = (), fine: Iterable[float] = ()
    ) -> None:
        """Creates the metric.

        Args:
          buckets: upper bounds that Prometheus sees.
          fine: further bounds, for percentiles.
        """
        self._name, self._text, self._buckets, self._labels = name, text, buckets, labels
        self._bounds = (*buckets, *fine)
        self._histograms: dict[tuple[str, ...], Histogram] = {}
        if not labels:
            self.labelled()

    def labelled(self, *values: str) -> Histogram:
        """Returns the histogram with these label values; it is created with its first use."""
        if values not in self._histograms:
            self._histograms[values] = Histogram(self._bounds)
        return self._histograms[values]

    def collect(self) -> Iterator[Metric]:
        family = HistogramMetricFamily(self._name, self._text, labels=self._labels)
        for values, one in list(self._histograms.items()):
            counts = one.counts  # read once: another thread may add
            below = one.at_most(counts, self._buckets)
            buckets = [(floatToGoString(bound), count) for bound, count in zip(self._buckets, below, strict=True)]
            family.add_metric(values, [*buckets, ("+Inf", int(counts.sum()))], one.total)
            family.add_sample(f"{self._name}_created", dict(zip(self._labels, values, strict=True)), one.created)
        yield family
