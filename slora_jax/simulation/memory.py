"""The pool of a simulated replica: the one place that builds the allocator and the residency."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from slora_jax.memory import AdapterResidency, PageAllocator, PageKind, Resident
from slora_jax.metrics import PoolPages
from slora_jax.simulation.system import SystemConfig


class SplitResidency(AdapterResidency):
    """Adapters in memory of their own (`adapters`), so that they neither take nor free pages of the KV pool."""

    def __init__(self, adapters: PageAllocator, num_slots: int, pages: Mapping[str, int]) -> None:
        """pages: of each adapter, by digest."""
        super().__init__(adapters, num_slots)
        self._pages = pages

    @property
    def evictable_pages(self) -> int:
        return 0

    @property
    def idle_pages(self) -> int:
        """Pages of adapters that nobody uses."""
        return self._idle_pages

    def pages_to_admit(self, digest: str, num_pages: int) -> int:
        return 0

    def can_acquire(self, digest: str) -> bool:
        room = self.allocator.num_free + self._idle_pages
        return super().can_acquire(digest) and (digest in self or self._pages[digest] <= room)

    def acquire(self, digest: str, ranks: np.ndarray, num_pages: int) -> tuple[Resident, bool]:
        super().make_room(0 if digest in self else num_pages)
        return super().acquire(digest, ranks, num_pages)

    def make_room(self, num_pages: int) -> None:
        """Evicting an adapter makes no room for KV."""


class SimulatedMemory:
    """Allocator and residency of one replica, unified or split."""

    def __init__(self, system: SystemConfig, num_tokens: int, adapter_pages: Mapping[str, int]) -> None:
        """adapter_pages: of each adapter, by digest."""
        self.allocator = PageAllocator(num_tokens // system.page_size + 1)
        self._adapters = self.allocator
        self.residency: AdapterResidency
        if system.adapter_tokens is None:
            self.residency = AdapterResidency(self.allocator, system.adapter_slots)
        else:
            self._adapters = PageAllocator(system.adapter_tokens // system.page_size + 1)
            self.residency = SplitResidency(self._adapters, system.adapter_slots, adapter_pages)
        self._immediate = system.eviction == "immediate"

    @property
    def is_split(self) -> bool:
        return self._adapters is not self.allocator

    def requests_ended(self) -> None:
        """Under immediate eviction, idle adapters go now."""
        if self._immediate:
            for resident in self.residency.residents:
                if not resident.users:
                    self.residency.drop(resident.digest)

    def adapter_capacity(self) -> int:
        """Pages that one adapter may have at most, to leave a page for KV."""
        return self._adapters.capacity - (0 if self.is_split else 1)

    def pages(self) -> PoolPages:
        """The pool by what it holds; a split pool's parts together."""
        residency = self.residency
        idle = residency.idle_pages if isinstance(residency, SplitResidency) else residency.evictable_pages
        adapters = self._adapters.count(PageKind.ADAPTER)
        free = self.allocator.num_free + (self._adapters.num_free if self.is_split else 0)
        capacity = self.allocator.capacity + (self._adapters.capacity if self.is_split else 0)
        return PoolPages(free, capacity - free - adapters, adapters - idle, idle)

    def check(self, kv: list[np.ndarray]) -> None:
        """Compares the owners' pages with the books; raises `PoolError` on any leak."""
        adapters = [resident.pages for resident in self.residency.residents]
        if self.is_split:
            self.allocator.check_owned({PageKind.KV: kv})
            self._adapters.check_owned({PageKind.ADAPTER: adapters})
        else:
            self.allocator.check_owned({PageKind.KV: kv, PageKind.ADAPTER: adapters})
