"""A list of requests as arrays."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

BASE = -1
"""Value of `Workload.adapter` for a request for the base model."""

INDEPENDENT = -1
"""Value of `Workload.after` for a request that arrives at its own time."""


@dataclass(frozen=True)
class Workload:
    """N requests.

    Attributes:
      arrival: float64 `[N]`, seconds from the start, ascending; with `after`, seconds from the end of that request.
      adapter: int `[N]`, index into `ranks`, or `BASE`.
      prompt_tokens, output_tokens: int `[N]`.
      ranks: of every registered adapter.
      prefix_text, prefix_tokens: int `[N]`, both or neither. A prompt begins with the first `prefix_tokens` tokens of
        text `prefix_text`, a number from 0; the rest is its own.
      after: int `[N]`, the number of an earlier request that each request follows (a closed loop), or `INDEPENDENT`;
        None: an open loop.
      names: of every registered adapter; None: their numbers.
      prompts: token ids of each request, or None for `prompt_tokens` random ones; None: all are random.
    """

    arrival: np.ndarray
    adapter: np.ndarray
    prompt_tokens: np.ndarray
    output_tokens: np.ndarray
    ranks: tuple[int, ...]
    prefix_text: np.ndarray | None = None
    prefix_tokens: np.ndarray | None = None
    after: np.ndarray | None = None
    names: tuple[str, ...] | None = None
    prompts: tuple[tuple[int, ...] | None, ...] | None = None

    def __post_init__(self) -> None:
        optional = (self.prefix_text, self.prefix_tokens, self.after)
        arrays = [self.arrival, self.adapter, self.prompt_tokens, self.output_tokens]
        sizes = {len(array) for array in arrays + [array for array in optional if array is not None]}
        if len(sizes) != 1:
            raise ValueError(f"Workload: arrays of {sorted(sizes)} requests; all must have one per request")
        follows = np.zeros(len(self), bool) if self.after is None else self.after != INDEPENDENT
        if self.after is not None and np.any(follows & ((self.after < 0) | (self.after >= np.arange(len(self))))):
            raise ValueError(f"Workload.after: must be {INDEPENDENT} or the number of an earlier request")
        if np.any(np.diff(self.arrival[~follows]) < 0):
            raise ValueError("Workload.arrival: must not decrease")
        if not np.all(self.arrival >= 0):
            raise ValueError("Workload.arrival: must be at least 0")
        if np.any((self.adapter < BASE) | (self.adapter >= len(self.ranks))):
            raise ValueError(f"Workload.adapter: must be {BASE} (the base model) or below {len(self.ranks)}")
        if self.names is not None and len(self.names) != len(self.ranks):
            raise ValueError(f"Workload.names: {len(self.names)} for {len(self.ranks)} adapters")
        if self.prompts is not None and len(self.prompts) != len(self):
            raise ValueError(f"Workload.prompts: {len(self.prompts)} for {len(self)} requests")
        if (self.prefix_text is None) != (self.prefix_tokens is None):
            raise ValueError("Workload.prefix_text, prefix_tokens: must both be given, or neither")
        if self.prefix_text is not None and self.prefix_tokens is not None:
            if np.any(self.prefix_text < 0):
                raise ValueError("Workload.prefix_text: must be at least 0")
            if np.any((self.prefix_tokens < 0) | (self.prefix_tokens > self.prompt_tokens)):
                raise ValueError("Workload.prefix_tokens: must be 0 to prompt_tokens")

    def __len__(self) -> int:
        return len(self.arrival)
