"""Adapters in the pool: their pages, their users, and which may be evicted (paper section 5.1). Unlike in the paper's
code, idle adapters stay.

An adapter is uploaded in one of two ways: `acquire` uploads it before the next step, for a request that starts now;
`prefetch` uploads it page by page during the steps, for a waiting request. It can be used once all pages have landed.
"""

from __future__ import annotations

from collections.abc import Container, KeysView, Mapping
from dataclasses import dataclass

import numpy as np

from slora_jax.errors import PoolError
from slora_jax.memory.allocator import PageKind
from slora_jax.memory.eviction import Evictable, Evictor
from slora_jax.metrics import PoolPages

FAR = 1 << 30
"""`Evictable.awaited` of an adapter that only requests far back in the queue need."""


@dataclass(eq=False, kw_only=True, slots=True)
class Resident(Evictable):
    """An adapter in the pool.

    Attributes:
      slot: row in the device's `AdapterTable`.
      pages: page ids.
      ranks: rank of each projection.
      staged: number of pages whose upload is planned.
      landed: number of pages that every later step finds in the pool.
      present: False after eviction.
      kept_waiting: whether its upload delayed the request that it was prefetched for.
    """

    digest: str
    slot: int
    pages: np.ndarray  # int32 [num_pages]
    ranks: np.ndarray  # int32 [7], [10] or [10 + 3 E], see `pallas_kernels.lora.layout`
    staged: int = 0
    landed: int = 0
    present: bool = True
    kept_waiting: bool = False

    @property
    def has_landed(self) -> bool:
        return self.landed == self.num_pages


@dataclass(frozen=True, slots=True)
class Upload:
    """An upload of pages `first .. first + count` of an adapter that runs while steps execute."""

    resident: Resident
    first: int
    count: int


class AdapterResidency:
    """Adapters in the pool, by digest.

    An adapter in use is never evicted. Idle adapters stay until their pages or slot are needed, and are evicted in the
    evictor's order: adapters that waiting requests need go last.

    Attributes:
      num_slots: rows of the device's `AdapterTable`, the maximum number of resident adapters.
      users: number of running requests by adapter digest, for adapters in use.
      evicted_before_use: digests that were prefetched for a waiting request and evicted before it used them.
    """

    def __init__(self, evictor: Evictor, num_slots: int) -> None:
        self.evictor = evictor
        self.num_slots = num_slots
        self.users: dict[str, int] = {}
        self.evicted_before_use: set[str] = set()
        self._resident: dict[str, Resident] = {}
        self._arriving: dict[str, Resident] = {}  # prefetched, upload not complete
        self._unused: dict[str, Resident] = {}  # prefetched, not used yet
        self._awaited: dict[str, Resident] = {}
        self._near: set[str] = set()  # digests needed near the head of the queue, resident or not
        self._free_slots = list(range(num_slots - 1, -1, -1))
        evictor.register(PageKind.ADAPTER, self._evict)

    def __contains__(self, digest: str | None) -> bool:
        return digest in self._resident

    def __len__(self) -> int:
        return len(self._resident)

    @property
    def residents(self) -> list[Resident]:
        return list(self._resident.values())

    @property
    def digests(self) -> KeysView[str]:
        return self._resident.keys()

    @property
    def arriving(self) -> Mapping[str, Resident]:
        """Adapters whose upload is not complete, by digest."""
        return self._arriving

    @property
    def num_unused(self) -> int:
        """Number of prefetched adapters that no request has used yet."""
        return len(self._unused)

    def find(self, digest: str) -> Resident | None:
        return self._resident.get(digest)

    def pages_to_admit(self, digest: str, num_pages: int, protect_awaited: bool = False) -> int:
        """Number of available (free or evictable) pages that one more use of this adapter consumes.

        All its pages if it is absent or idle (it stops being evictable); 0 if it is in use or protected as awaited.
        """
        resident = self._resident.get(digest)
        is_protected = resident is not None and protect_awaited and resident.awaited
        return 0 if digest in self.users or is_protected else num_pages

    def can_acquire(self, digest: str, protect_awaited: bool = False) -> bool:
        """Returns whether the adapter has a slot or can get one. Does not check pages."""
        return (
            digest in self._resident
            or bool(self._free_slots)
            or self.evictor.has_idle(PageKind.ADAPTER, protect_awaited)
        )

    def acquire(self, digest: str, ranks: np.ndarray, num_pages: int) -> tuple[Resident, bool]:
        """Begins one use of an adapter, evicting idle content if it needs pages and a slot.

        Returns:
          The adapter, and whether it is new: if so, the caller must upload its tiles before the next step.

        Raises:
          PoolError: too few pages or slots even after eviction, or its prefetch has not landed.
        """
        resident = self._resident.get(digest)
        new = resident is None
        if resident is None:
            resident = self._place(digest, ranks, num_pages, protect_awaited=False)
            resident.staged = resident.landed = num_pages
        elif not resident.has_landed:
            raise PoolError(f"use of adapter {digest[:12]}: only {resident.landed} of {num_pages} pages have landed")
        elif self._unused.pop(digest, None) is not None:
            self.evictor.counters.prefetch_hits += not resident.kept_waiting
        else:
            self.evictor.counters.adapter_hits += 1
        if resident.idle:
            self.evictor.remove(resident)
        self.users[digest] = self.users.get(digest, 0) + 1
        resident.uses += 1
        self.evicted_before_use.discard(digest)
        return resident, new

    def prefetch(
        self, digest: str, ranks: np.ndarray, num_pages: int, position: int, protect_awaited: bool
    ) -> Resident:
        """Allocates pages and a slot for an absent adapter that a waiting request needs.

        Args:
          position: position of that request in the queue, from 1.
          protect_awaited: do not evict content that other requests wait for.

        Raises:
          PoolError: too few pages or slots even after eviction.
        """
        resident = self._place(digest, ranks, num_pages, protect_awaited)
        resident.awaited = position
        self._near.add(digest)
        self._awaited[digest] = self._arriving[digest] = self._unused[digest] = resident
        self.evictor.add(resident)
        return resident

    def await_only(self, positions: Mapping[str, int], wanted: Container[str | None]) -> None:
        """Updates which resident adapters are awaited.

        An awaited adapter that is no longer in `positions` stays awaited, behind those, while it is in `wanted`.
        Otherwise it becomes ordinary idle content, or is evicted if its upload is not complete.

        Args:
          positions: for each digest needed near the head of the queue, position from 1 of the first request needing it.
          wanted: digests that any waiting request needs, including those of `positions`.
        """
        for digest, position in positions.items():
            resident = self._resident.get(digest)
            if (
                resident is not None
                and resident.awaited != position
                and not (digest in self.users and resident.awaited)
            ):
                self.evictor.await_(resident, position)
                self._awaited[digest] = resident
        for digest in self._near.difference(positions):
            if digest in self._awaited:
                self.evictor.await_(self._awaited[digest], FAR)
        self._near = set(positions)
        for digest in [digest for digest in self._awaited if digest not in wanted]:
            resident = self._awaited.pop(digest)
            if resident.has_landed:
                self.evictor.counters.prefetches_wasted += self._unused.pop(digest, None) is not None
                self.evictor.await_(resident, 0)
            else:
                self.evictor.evict(resident)
        if self.evicted_before_use:
            self.evicted_before_use = {digest for digest in self.evicted_before_use if digest in wanted}

    def uploads(self, budget: int) -> list[Upload]:
        """Plans uploads of at most `budget` pages of prefetched adapters, in the order of the requests that need them.
        The caller reports each upload by `landed`."""
        uploads = []
        for resident in sorted(self._arriving.values(), key=lambda resident: resident.awaited):
            count = min(resident.num_pages - resident.staged, budget)
            if count > 0:
                uploads.append(Upload(resident, resident.staged, count))
                resident.staged += count
                budget -= count
        return uploads

    def landed(self, upload: Upload) -> None:
        """Records that every step dispatched from now on finds the uploaded pages in the pool, or that the upload was
        discarded because its adapter was evicted."""
        resident = upload.resident
        resident.landed += upload.count
        if resident.present and resident.has_landed:
            del self._arriving[resident.digest]

    def release(self, digest: str) -> None:
        """Ends one use; after the last use the adapter is idle. Raises PoolError if it is not in use."""
        if digest not in self.users:
            raise PoolError(f"release of adapter {digest[:12]}: it is not in use")
        self.users[digest] -= 1
        if not self.users[digest]:
            del self.users[digest]
            self.evictor.add(self._resident[digest])

    def drop(self, digest: str) -> bool:
        """Evicts an adapter if it is idle or still uploading. Returns whether it is absent afterwards."""
        resident = self._resident.get(digest)
        if resident is not None and resident.idle:
            self.evictor.evict(resident)
        return digest not in self._resident

    def _place(self, digest: str, ranks: np.ndarray, num_pages: int, protect_awaited: bool) -> Resident:
        self.evictor.make_room(num_pages, PageKind.ADAPTER, protect_awaited)
        if not self._free_slots:
            if not self.evictor.has_idle(PageKind.ADAPTER, protect_awaited):
                raise PoolError(f"all {self.num_slots} adapter slots are in use")
            self.evictor.evict_one(PageKind.ADAPTER, protect_awaited)
        pages = self.evictor.allocator.allocate(num_pages, PageKind.ADAPTER)  # before the slot, as it may raise
        resident = Resident(
            kind=PageKind.ADAPTER, num_pages=num_pages, digest=digest, slot=self._free_slots.pop(), pages=pages,
            ranks=ranks,
        )  # fmt: skip
        self._resident[digest] = resident
        self.evictor.counters.adapter_loads += 1
        return resident

    def _evict(self, resident: Evictable) -> None:
        assert isinstance(resident, Resident)
        digest = resident.digest
        del self._resident[digest]
        resident.present = False
        self._arriving.pop(digest, None)
        wanted = self._awaited.pop(digest, None) is not None
        if self._unused.pop(digest, None) is not None:
            self.evictor.counters.prefetches_wasted += 1
            if wanted:
                self.evicted_before_use.add(digest)
        self.evictor.allocator.free(resident.pages)
        self._free_slots.append(resident.slot)
        self.evictor.counters.adapter_evictions += 1


def pool_pages(residency: AdapterResidency) -> PoolPages:
    """Counts the pages of the pool by content."""
    evictor = residency.evictor
    allocator = evictor.allocator
    idle = evictor.pages(PageKind.ADAPTER)  # includes adapters being uploaded
    arriving = sum(resident.num_pages for resident in residency.arriving.values())
    prefix_idle = evictor.pages(PageKind.PREFIX)
    return PoolPages(
        free=allocator.num_free,
        kv=allocator.count(PageKind.KV),
        prefix_in_use=allocator.count(PageKind.PREFIX) - prefix_idle,
        prefix_idle=prefix_idle,
        adapter_in_use=allocator.count(PageKind.ADAPTER) - idle,
        adapter_idle=idle - arriving,
        adapter_arriving=arriving,
    )
