"""Knees: the request rate at which the mean first-token latency rises steeply."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import pairwise

from experiments.paper.exclusions import exclusion
from experiments.paper.results import PaperRow

TAKE_OFF_SECONDS = 3.0
"""A mean first-token latency that no prefill explains: half the paper's objective of 6 s."""


@dataclass(frozen=True)
class Knee:
    """The place where a curve of latency over rate crosses `TAKE_OFF_SECONDS`. rate: None if it lies outside the
    measured rates; `side` is then "below" the lowest or "above" the highest."""

    rate: float | None
    side: str = "inside"


def find_knee(rates: Iterable[float], latencies: Iterable[float], threshold: float = TAKE_OFF_SECONDS) -> Knee:
    """Finds the first crossing of the threshold, on straight lines of log latency between the measured rates.

    rates: ascending, requests per second. latencies: means, seconds, positive.
    """
    points = list(zip(rates, latencies, strict=True))
    if points[0][1] >= threshold:
        return Knee(None, "below")
    for (r0, t0), (r1, t1) in pairwise(points):
        if t1 >= threshold:
            return Knee(r0 + (r1 - r0) * math.log(threshold / t0) / math.log(t1 / t0))
    return Knee(None, "above")


def rate_sweeps(rows: Iterable[PaperRow]) -> list[list[PaperRow]]:
    """Returns the published sweeps over at least three request rates, each in order of rate, without excluded rows."""
    groups: dict[tuple[str, float], list[PaperRow]] = defaultdict(list)
    for row in rows:
        if exclusion(row) is None:
            groups[row.file, row.duration].append(row)
    sweeps = [sorted(group, key=lambda row: row.rate) for group in groups.values()]
    return [sweep for sweep in sweeps if len({row.rate for row in sweep}) == len(sweep) >= 3]


def knee_error(published: Knee, simulated: Knee) -> float | None:
    """Returns the relative error of the rate; None if a rate lies outside the measured ones."""
    if published.rate is None or simulated.rate is None:
        return None
    return simulated.rate / published.rate - 1


def knees_agree(published: Knee, simulated: Knee, tolerance: float) -> bool:
    """Returns whether the rates are within `tolerance`, or both lie outside on the same side."""
    error = knee_error(published, simulated)
    return published.side == simulated.side if error is None else abs(error) <= tolerance
