"""Which adapters lie in the pool, where, and which may go (paper section 5.1; unlike its code, idle adapters stay)."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from slora_jax.errors import PoolError
from slora_jax.memory.allocator import PageKind
from slora_jax.memory.eviction import Evictable, Evictor


@dataclass(eq=False, kw_only=True, slots=True)
class Resident(Evictable):
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


class AdapterResidency:
    """Adapters on the device, by digest. An adapter in use is never evicted; idle ones stay until their pages (or slot)
    are wanted and go as the evictor's policy says.

    `num_slots` bounds how many adapters are resident at once: rows of the device's `AdapterTable`.
    """

    def __init__(self, evictor: Evictor, num_slots: int) -> None:
        self.evictor = evictor
        self.num_slots = num_slots
        self.counters = ResidencyCounters()
        self._resident: dict[str, Resident] = {}
        self._free_slots = list(range(num_slots - 1, -1, -1))
        evictor.owns(PageKind.ADAPTER, self._evict)

    def __contains__(self, digest: str) -> bool:
        return digest in self._resident

    def __len__(self) -> int:
        return len(self._resident)

    @property
    def residents(self) -> list[Resident]:
        return list(self._resident.values())

    def pages_to_admit(self, digest: str, num_pages: int) -> int:
        """Pages of free or evictable memory that using this adapter takes: all of its pages when it is absent or idle
        (an idle adapter stops being evictable), none when others use it already."""
        resident = self._resident.get(digest)
        return 0 if resident is not None and resident.users else num_pages

    def can_acquire(self, digest: str) -> bool:
        """Whether a slot can be had; pages are the caller's arithmetic."""
        return digest in self._resident or bool(self._free_slots) or self.evictor.has_idle(PageKind.ADAPTER)

    def acquire(self, digest: str, ranks: np.ndarray, num_pages: int) -> tuple[Resident, bool]:
        """Takes the adapter into use, evicting idle things for its pages and slot. Returns it, and whether it is new in
        the pool, in which case the caller uploads its tiles before the next step.

        Raises:
          PoolError: pages or slots do not suffice even after eviction; nothing in use was evicted.
        """
        resident = self._resident.get(digest)
        if resident is not None:
            if resident.idle:
                self.evictor.remove(resident)
            resident.users += 1
            resident.uses += 1
            self.counters.hits += 1
            return resident, False
        self.evictor.make_room(num_pages, PageKind.ADAPTER)
        if not self._free_slots:
            self._evict_for_a_slot()
        allocator = self.evictor.allocator
        pages = allocator.allocate(num_pages, PageKind.ADAPTER)  # may raise, so no slot is taken yet
        resident = Resident(
            kind=PageKind.ADAPTER, num_pages=num_pages, uses=1, digest=digest, slot=self._free_slots.pop(),
            pages=pages, ranks=ranks, users=1,
        )  # fmt: skip
        self._resident[digest] = resident
        self.counters.loads += 1
        return resident, True

    def release(self, digest: str) -> None:
        """Ends one use. The last one leaves the adapter idle.

        Raises:
          PoolError: the adapter is not resident or not in use.
        """
        resident = self._resident.get(digest)
        if resident is None or not resident.users:
            raise PoolError(f"release of adapter {digest[:12]}, which is not in use")
        resident.users -= 1
        if not resident.users:
            self.evictor.add(resident)

    def drop(self, digest: str) -> bool:
        """Evicts one adapter now if it is resident and idle (after an unload). Returns whether it is gone."""
        resident = self._resident.get(digest)
        if resident is not None and resident.idle:
            self.evictor.evict(resident)
        return digest not in self._resident

    def _evict_for_a_slot(self) -> None:
        if not self.evictor.has_idle(PageKind.ADAPTER):
            raise PoolError(f"all {self.num_slots} adapter slots are in use")
        self.evictor.evict_one(PageKind.ADAPTER)

    def _evict(self, resident: Evictable) -> None:
        assert isinstance(resident, Resident)
        del self._resident[resident.digest]
        self.evictor.allocator.free(resident.pages)
        self._free_slots.append(resident.slot)
        self.counters.evictions += 1
