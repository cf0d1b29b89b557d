"""Use of the unified pool over time."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields

import numpy as np

from slora_jax.errors import MetricsError


@dataclass(frozen=True)
class PoolPages:
    """Number of pages by content. The sum is all pages but the dummy page.

    Attributes:
      kv: KV pages that belong to one running request.
      prefix_in_use, prefix_idle: pages of the prefix cache, used by running requests or idle.
      adapter_in_use, adapter_idle: pages of adapters, used by running requests or idle.
      adapter_arriving: pages of adapters being uploaded.
    """

    free: int
    kv: int
    prefix_in_use: int
    prefix_idle: int
    adapter_in_use: int
    adapter_idle: int
    adapter_arriving: int = 0

    @property
    def prefix(self) -> int:
        """Pages of the prefix cache."""
        return self.prefix_in_use + self.prefix_idle

    @property
    def adapter(self) -> int:
        """Pages of adapters."""
        return self.adapter_in_use + self.adapter_idle + self.adapter_arriving

    @property
    def total(self) -> int:
        """All pages but the dummy page."""
        return sum(getattr(self, kind) for kind in PAGE_KINDS)


PAGE_KINDS = tuple(field.name for field in fields(PoolPages))
"""Field names of `PoolPages`."""


@dataclass(frozen=True)
class PoolSample:
    """The pool and the queues at one moment.

    Attributes:
      time: seconds on the engine's clock.
      running, waiting: number of requests.
      uploading: bytes in flight to the pool.
    """

    time: float
    pages: PoolPages
    running: int
    waiting: int
    uploading: int = 0


@dataclass(frozen=True)
class PoolUse:
    """Fractions of the pool by field of `PoolPages`, in [0, 1]: the mean over time and the maximum over samples."""

    mean: dict[str, float]
    peak: dict[str, float]


def pool_use(samples: Sequence[PoolSample]) -> PoolUse:
    """Summarizes samples, weighted by the time until the next one. Raises MetricsError if they cover no time."""
    times = np.array([s.time for s in samples])
    if times.size < 2 or times[-1] <= times[0]:
        raise MetricsError(f"pool use: {times.size} samples cover no time")
    weights = np.diff(times)
    shares = np.array([[getattr(s.pages, kind) / s.pages.total for kind in PAGE_KINDS] for s in samples])  # [S, kinds]
    mean = np.average(shares[:-1], axis=0, weights=weights)
    return PoolUse(
        mean=dict(zip(PAGE_KINDS, mean.tolist(), strict=True)),
        peak=dict(zip(PAGE_KINDS, shares.max(0).tolist(), strict=True)),
    )
