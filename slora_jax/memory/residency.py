"""Which adapters lie in the pool, where, and which may go (paper section 5.1; unlike its code, idle adapters stay).

An adapter comes in one of two ways: `acquire` for a request that starts now, uploaded before the next step; or `bring`
for one that waits, uploaded page by page beside the steps, and used when it has landed.
"""

from __future__ import annotations

from collections.abc import Container, KeysView, Mapping
from dataclasses import dataclass

import numpy as np

from slora_jax.errors import PoolError
from slora_jax.memory.allocator import PageKind
from slora_jax.memory.eviction import Evictable, Evictor

FAR = 1 << 30
"""`Evictable.awaited` of what is wanted by requests far back in the queue."""


@dataclass(eq=False, kw_only=True, slots=True)
class Resident(Evictable):
    """An adapter in the pool: its row in the device's `AdapterTable`, its pages, and how many requests use it.

    staged: pages whose copy was begun; landed: pages that every later step finds in the pool. present: False once it
    was evicted. kept_waiting: the request that it was brought for would have been admitted before it had landed.
    """

    digest: str
    slot: int
    pages: np.ndarray  # int32 [num_pages]
    ranks: np.ndarray  # int32 [7]
    users: int = 0
    staged: int = 0
    landed: int = 0
    present: bool = True
    kept_waiting: bool = False

    @property
    def has_landed(self) -> bool:
        return self.landed == self.num_pages


@dataclass(frozen=True, slots=True)
class Upload:
    """Pages `first .. first + count` of an adapter, to be copied to the device beside the steps."""

    resident: Resident
    first: int
    count: int


@dataclass
class ResidencyCounters:
    """Since the engine's start. loads: adapters that were given pages and uploaded (or whose upload was begun).
    evictions. hits: uses that found the adapter still in the pool. prefetch_hits: adapters brought ahead that had
    landed when the first request for them came to its turn; wasted: brought ahead, and evicted, or wanted by nobody any
    more, before any use."""

    loads: int = 0
    evictions: int = 0
    hits: int = 0
    prefetch_hits: int = 0
    wasted: int = 0


class AdapterResidency:
    """Adapters on the device, by digest. An adapter in use is never evicted; idle ones stay until their pages (or slot)
    are wanted and go as the evictor's policy says; those that waiting requests want, last.

    `num_slots` bounds how many adapters are resident at once: rows of the device's `AdapterTable`.
    """

    def __init__(self, evictor: Evictor, num_slots: int) -> None:
        self.evictor = evictor
        self.num_slots = num_slots
        self.counters = ResidencyCounters()
        self.bereft: set[str] = set()  # evicted before a waiting request could use them
        self.pages_in_flight = 0  # copies under way, those of adapters evicted meanwhile included
        self._resident: dict[str, Resident] = {}
        self._arriving: dict[str, Resident] = {}  # brought, and not landed
        self._unused: dict[str, Resident] = {}  # brought, and not used yet
        self._awaited: dict[str, Resident] = {}
        self._near: set[str] = set()  # wanted near the head of the queue, in the pool or not
        self._free_slots = list(range(num_slots - 1, -1, -1))
        evictor.owns(PageKind.ADAPTER, self._evict)

    def __contains__(self, digest: str | None) -> bool:
        return digest in self._resident

    def __len__(self) -> int:
        return len(self._resident)

    @property
    def residents(self) -> list[Resident]:
        return list(self._resident.values())

    @property
    def digests(self) -> KeysView[str]:
        """Of all residents."""
        return self._resident.keys()

    @property
    def arriving(self) -> Mapping[str, Resident]:
        """Adapters whose pages have not all landed, by digest."""
        return self._arriving

    @property
    def num_unused(self) -> int:
        """Adapters that were brought ahead and not used yet."""
        return len(self._unused)

    def find(self, digest: str) -> Resident | None:
        return self._resident.get(digest)

    def pages_to_admit(self, digest: str, num_pages: int, spare: bool = False) -> int:
        """Pages of free or evictable memory that using this adapter takes: all of its pages when it is absent or idle
        (an idle adapter stops being evictable), none when others use it already, or when it counts as spared."""
        resident = self._resident.get(digest)
        return 0 if resident is not None and (resident.users or (spare and resident.awaited)) else num_pages

    def can_acquire(self, digest: str, spare: bool = False) -> bool:
        """Whether a slot can be had; pages are the caller's arithmetic."""
        return digest in self._resident or bool(self._free_slots) or self.evictor.has_idle(PageKind.ADAPTER, spare)

    def acquire(self, digest: str, ranks: np.ndarray, num_pages: int) -> tuple[Resident, bool]:
        """Takes the adapter into use, evicting idle things for its pages and slot. Returns it, and whether it is new in
        the pool, in which case the caller uploads its tiles before the next step.

        Raises:
          PoolError: pages or slots do not suffice even after eviction; nothing in use was evicted. Or it is on its way.
        """
        resident = self._resident.get(digest)
        new = resident is None
        if resident is None:
            resident = self._place(digest, ranks, num_pages, spare=False)
            resident.staged = resident.landed = num_pages
        elif not resident.has_landed:
            raise PoolError(
                f"use of adapter {digest[:12]}, of which {resident.landed} of {num_pages} pages have landed"
            )
        elif self._unused.pop(digest, None) is not None:
            self.counters.prefetch_hits += not resident.kept_waiting
        else:
            self.counters.hits += 1
        if resident.idle:
            self.evictor.remove(resident)
        resident.users += 1
        resident.uses += 1
        self.bereft.discard(digest)
        return resident, new

    def bring(self, digest: str, ranks: np.ndarray, num_pages: int, position: int, spare: bool) -> Resident:
        """Takes pages and a slot for an absent adapter that the `position`th waiting request wants (from 1).
        `spare`: nothing that others wait for is evicted for it.

        Raises:
          PoolError: pages or slots do not suffice even after eviction.
        """
        resident = self._place(digest, ranks, num_pages, spare)
        resident.awaited = position
        self._near.add(digest)
        self._awaited[digest] = self._arriving[digest] = self._unused[digest] = resident
        self.evictor.add(resident)
        return resident

    def await_only(self, positions: Mapping[str, int], wanted: Container[str | None]) -> None:
        """Which adapters in the pool waiting requests want. `positions`: digest -> the first request's, from 1, near
        the head of the queue. An adapter that was wanted before and is not among these stays so, behind them, while it
        is in `wanted`, as they all are; otherwise it is an ordinary idle one, or, if it has not landed, is given up."""
        for digest, position in positions.items():
            resident = self._resident.get(digest)
            if resident is not None and resident.awaited != position and not (resident.users and resident.awaited):
                self.evictor.await_(resident, position)
                self._awaited[digest] = resident
        for digest in self._near.difference(positions):
            if digest in self._awaited:
                self.evictor.await_(self._awaited[digest], FAR)
        self._near = set(positions)
        for digest in [digest for digest in self._awaited if digest not in wanted]:
            resident = self._awaited.pop(digest)
            if resident.has_landed:
                self.counters.wasted += self._unused.pop(digest, None) is not None
                self.evictor.await_(resident, 0)
            else:
                self.evictor.evict(resident)
        if self.bereft:
            self.bereft = {digest for digest in self.bereft if digest in wanted}

    def uploads(self, most: int) -> list[Upload]:
        """The next pages to copy, at most `most` and no more than leaves `2 * most` in flight, of the adapters whose
        requests come first. They count as staged from now on; each is answered by `land`."""
        budget = min(most, 2 * most - self.pages_in_flight)
        uploads = []
        for resident in sorted(self._arriving.values(), key=lambda resident: resident.awaited):
            count = min(resident.num_pages - resident.staged, budget)
            if count > 0:
                uploads.append(Upload(resident, resident.staged, count))
                resident.staged += count
                budget -= count
                self.pages_in_flight += count
        return uploads

    def land(self, upload: Upload) -> None:
        """These pages are in the pool for every step dispatched from now on (or were dropped on arrival, because the
        adapter was evicted meanwhile)."""
        resident = upload.resident
        self.pages_in_flight -= upload.count
        resident.landed += upload.count
        if resident.present and resident.has_landed:
            del self._arriving[resident.digest]

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
        """Evicts one adapter now if it is resident and idle, or on its way. Returns whether it is gone."""
        resident = self._resident.get(digest)
        if resident is not None and resident.idle:
            self.evictor.evict(resident)
        return digest not in self._resident

    def _place(self, digest: str, ranks: np.ndarray, num_pages: int, spare: bool) -> Resident:
        self.evictor.make_room(num_pages, PageKind.ADAPTER, spare)
        if not self._free_slots:
            if not self.evictor.has_idle(PageKind.ADAPTER, spare):
                raise PoolError(f"all {self.num_slots} adapter slots are in use")
            self.evictor.evict_one(PageKind.ADAPTER, spare)
        pages = self.evictor.allocator.allocate(num_pages, PageKind.ADAPTER)  # may raise, so no slot is taken yet
        resident = Resident(
            kind=PageKind.ADAPTER, num_pages=num_pages, digest=digest, slot=self._free_slots.pop(), pages=pages,
            ranks=ranks,
        )  # fmt: skip
        self._resident[digest] = resident
        self.counters.loads += 1
        return resident

    def _evict(self, resident: Evictable) -> None:
        assert isinstance(resident, Resident)
        digest = resident.digest
        del self._resident[digest]
        resident.present = False
        self._arriving.pop(digest, None)
        wanted = self._awaited.pop(digest, None) is not None
        if self._unused.pop(digest, None) is not None:
            self.counters.wasted += 1
            if wanted:
                self.bereft.add(digest)
        self.evictor.allocator.free(resident.pages)
        self._free_slots.append(resident.slot)
        self.counters.evictions += 1
