"""A list of requests as arrays."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

BASE = -1
"""The adapter of a request for the base model."""


@dataclass(frozen=True)
class Workload:
    """N requests in order of arrival. arrival: seconds from the start, float64 `[N]`. adapter: index into `ranks`, or
    `BASE`, int `[N]`. prompt_tokens, output_tokens: int `[N]`. ranks: of every registered adapter."""

    arrival: np.ndarray
    adapter: np.ndarray
    prompt_tokens: np.ndarray
    output_tokens: np.ndarray
    ranks: tuple[int, ...]

    def __post_init__(self) -> None:
        sizes = {len(a) for a in (self.arrival, self.adapter, self.prompt_tokens, self.output_tokens)}
        if len(sizes) != 1:
            raise ValueError(f"Workload: arrays of {sorted(sizes)} requests; all must have one per request")
        if np.any(np.diff(self.arrival) < 0):
            raise ValueError("Workload.arrival: must not decrease")
        if np.any((self.adapter < BASE) | (self.adapter >= len(self.ranks))):
            raise ValueError(f"Workload.adapter: must be {BASE} (the base model) or below {len(self.ranks)}")

    def __len__(self) -> int:
        return len(self.arrival)
