"""Snapshots of an engine: its counters, its pool page by page, its adapters by state.

The engine belongs to one thread. That thread calls `observe` and `page_kinds` between steps; both take microseconds,
however many adapters are registered. Their results may be read from any thread.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np

from slora_jax.adapters import StoreStats, Tier
from slora_jax.engine import Engine, EngineStats
from slora_jax.memory import PageKind, Resident
from slora_jax.metrics import PAGE_KINDS as POOL_KINDS

PAGE_KINDS = (*POOL_KINDS, "dummy")
"""Contents of a page: those of `PoolPages`, and page 0, which padding reads."""

FREE, KV, PREFIX_IN_USE, PREFIX_IDLE, ADAPTER_IN_USE, ADAPTER_IDLE, ADAPTER_ARRIVING, DUMMY = range(8)

State = Literal["disk", "host", "loading", "device", "pinned"]
"""State of an adapter: spilled; in host memory; in upload; in the pool and idle; in the pool and in use by a running
request."""
STATES: tuple[State, ...] = get_args(State)

_KIND_UNLESS_IN_USE = np.zeros(len(PageKind), np.uint8)  # by `PageKind`
_KIND_UNLESS_IN_USE[[PageKind.FREE, PageKind.KV, PageKind.PREFIX, PageKind.ADAPTER, PageKind.DUMMY]] = (
    *(FREE, KV, PREFIX_IDLE, ADAPTER_IDLE, DUMMY),
)


@dataclass(frozen=True)
class EngineSnapshot:
    """An engine at one moment.

    Attributes:
      time: seconds of `time.monotonic`.
      pages: number of pages by content (`PAGE_KINDS`).
      device: state of each adapter in the pool, by digest. All other adapters are on "host" or "disk".
    """

    time: float
    stats: EngineStats
    store: StoreStats
    pages: Mapping[str, int]
    device: Mapping[str, State]

    def states(self, tiers: Mapping[str, Tier]) -> dict[State, int]:
        """Counts adapters (distinct contents) by state.

        Args:
          tiers: result of `AdapterStore.tiers`.
        """
        counts: Counter[State] = Counter(self.device.values())
        counts.update(tier for digest, tier in tiers.items() if digest not in self.device)
        return {state: counts[state] for state in STATES}


def observe(engine: Engine) -> EngineSnapshot:
    """Takes a snapshot, on the engine's thread between steps."""
    stats, residency = engine.stats(), engine.residency
    device: dict[str, State] = dict.fromkeys(residency.digests, "device")
    device.update(dict.fromkeys(residency.arriving, "loading"))
    device.update((resident.digest, "pinned") for resident in _in_use(engine))
    pages = vars(stats.pages) | {"dummy": 1}
    return EngineSnapshot(time.monotonic(), stats, engine.store.stats(), pages, device)


def page_kinds(engine: Engine) -> np.ndarray:
    """Returns the content of each page, on the engine's thread: indices into `PAGE_KINDS`, uint8 `[num_pages]`."""
    kinds = _KIND_UNLESS_IN_USE[engine.allocator.kinds]
    if engine.prefixes is not None:
        kinds[np.frombuffer(engine.prefixes.in_use, bool)] = PREFIX_IN_USE
    for residents, kind in ((_in_use(engine), ADAPTER_IN_USE), (engine.residency.arriving.values(), ADAPTER_ARRIVING)):
        if residents:
            kinds[np.concatenate([resident.pages for resident in residents])] = kind
    return kinds


def _in_use(engine: Engine) -> list[Resident]:
    """Adapters that running requests use: at most `max_num_seqs`, however many are resident."""
    found = (engine.residency.find(digest) for digest in engine.residency.users)
    return [resident for resident in found if resident is not None]
