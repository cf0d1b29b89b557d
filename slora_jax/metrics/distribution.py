"""Mean and percentiles of a measured quantity."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Distribution:
    """Summary of `count` values, in their unit. Percentiles are interpolated linearly, as in NumPy and the paper.

    Without values, all fields but `count` are NaN.
    """

    count: int
    mean: float
    p50: float
    p90: float
    p99: float
    maximum: float

    @classmethod
    def of(cls, values: Iterable[float]) -> Distribution:
        array = np.fromiter(values, float)
        if not array.size:
            return cls(0, math.nan, math.nan, math.nan, math.nan, math.nan)
        p50, p90, p99 = np.percentile(array, (50, 90, 99)).tolist()
        return cls(array.size, float(array.mean()), p50, p90, p99, float(array.max()))
