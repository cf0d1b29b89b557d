"""Which adapters lie in the pool, where, and which may go (paper section 5.1; unlike its code, idle adapters stay)."""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass, field

import numpy as np

from slora_jax.errors import PoolError
from slora_jax.memory.allocator import PageAllocator, PageKind


@dataclass
class Resident:
    """An adapter in the pool: its row in the device's `AdapterTable`, its pages, and how many requests use it."""

    digest: str
    slot: int
    pages: np.ndarray  # int32 [num_pages]
    ranks: np.ndarray  # int32 [7]
    users: int = 0


@dataclass
class ResidencyCounters:
    """Since the engine's start: uploads, evictions, and uses that found the adapter resident."""

    loads: int = 0
    evictions: int = 0
    hits: int = 0


@dataclass
class AdapterResidency:
    """Adapters on the device, by digest. An adapter in use is never evicted; idle ones stay until their pages (or slot)
    are wanted and go least recently used first.

    `num_slots` bounds how many adapters are resident at once: rows of the device's `AdapterTable`.
    """

    allocator: PageAllocator
    num_slots: int
    counters: ResidencyCounters = field(default_factory=ResidencyCounters)

    def __post_init__(self) -> None:
        self._resident: dict[str, Resident] = {}
        self._idle: OrderedDict[str, Resident] = OrderedDict()  # least recently used first
        self._idle_pages = 0
        self._free_slots = list(range(self.num_slots - 1, -1, -1))

    def __contains__(self, digest: str) -> bool:
        return digest in self._resident

    def __len__(self) -> int:
        return len(self._resident)

    @property
    def residents(self) -> list[Resident]:
        return list(self._resident.values())

    @property
    def evictable_pages(self) -> int:
        """Pages that eviction of every idle adapter would free."""
        return self._idle_pages

    def pages_to_admit(self, digest: str, num_pages: int) -> int:
        """Pages of free or evictable memory that using this adapter takes: all of its pages when it is absent or idle
        (an idle adapter stops being evictable), none when others use it already."""
        resident = self._resident.get(digest)
        return 0 if resident is not None and resident.users else num_pages

    def can_acquire(self, digest: str) -> bool:
        """Whether a slot can be had; pages are the caller's arithmetic."""
        return digest in self._resident or bool(self._free_slots) or bool(self._idle)

    def acquire(self, digest: str, ranks: np.ndarray, num_pages: int) -> tuple[Resident, bool]:
        """Takes the adapter into use, evicting idle ones for its pages and slot. Returns it, and whether it is new in
        the pool, in which case the caller uploads its tiles before the next step.

        Raises:
          PoolError: pages or slots do not suffice even after eviction; nothing but idle adapters was evicted.
        """
        resident = self._resident.get(digest)
        if resident is not None:
            if not resident.users:
                del self._idle[digest]
                self._idle_pages -= resident.pages.size
            resident.users += 1
            self.counters.hits += 1
            return resident, False
        self.make_room(num_pages)
        if not self._free_slots:
            self._evict_oldest()
        pages = self.allocator.allocate(num_pages, PageKind.ADAPTER)  # may raise, so no slot is taken yet
        resident = Resident(digest, self._free_slots.pop(), pages, ranks, users=1)
        self._resident[digest] = resident
        self.counters.loads += 1
        return resident, True

    def release(self, digest: str) -> None:
        """Ends one use. The last one leaves the adapter idle, the most recently used of the idle.

        Raises:
          PoolError: the adapter is not resident or not in use.
        """
        resident = self._resident.get(digest)
        if resident is None or not resident.users:
            raise PoolError(f"release of adapter {digest[:12]}, which is not in use")
        resident.users -= 1
        if not resident.users:
            self._idle[digest] = resident
            self._idle_pages += resident.pages.size

    def make_room(self, num_pages: int) -> None:
        """Evicts idle adapters, least recently used first, until `num_pages` pages are free or none is idle."""
        while not self.allocator.can_allocate(num_pages) and self._idle:
            self._evict_oldest()

    def drop(self, digest: str) -> bool:
        """Evicts one adapter now if it is resident and idle (after an unload). Returns whether it is gone."""
        if digest in self._idle:
            self._evict(digest)
        return digest not in self._resident

    def _evict_oldest(self) -> None:
        if not self._idle:
            raise PoolError(f"all {self.num_slots} adapter slots are in use")
        self._evict(next(iter(self._idle)))

    def _evict(self, digest: str) -> None:
        resident = self._idle.pop(digest)
        self._idle_pages -= resident.pages.size
        del self._resident[digest]
        self.allocator.free(resident.pages)
        self._free_slots.append(resident.slot)
        self.counters.evictions += 1
