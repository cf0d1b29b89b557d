"""The page allocator: one free list for KV and adapter pages (paper section 5.1, unified paging)."""

from __future__ import annotations

from enum import IntEnum

import numpy as np

from slora_jax.errors import PoolError

DUMMY_PAGE = 0
"""The page that padded reads go to. Never allocated, never written."""


class PageKind(IntEnum):
    """Content of a page."""

    FREE = 0
    KV = 1
    """KV of one running request."""
    ADAPTER = 2
    DUMMY = 3
    PREFIX = 4
    """KV registered in the prefix cache, in use or idle."""


class PageAllocator:
    """Allocates and frees page ids in O(1) per page from a stack of free ids.

    Any page can hold any kind of content, so the pool never fragments.

    Attributes:
      num_pages: pages of the pool, the dummy page 0 included.
      adapter_pages: None for the unified pool; otherwise a fixed split (baseline `no-unify-mem`): adapters use exactly
        this many pages, and KV the rest.
      kinds: uint8 `[num_pages]`, the `PageKind` of each page. Read-only for callers.
    """

    def __init__(self, num_pages: int, adapter_pages: int | None = None) -> None:
        if num_pages < 2:
            raise PoolError(f"num_pages={num_pages}: a pool needs at least 2 pages, including the dummy page")
        if adapter_pages is not None and not 0 <= adapter_pages < num_pages - 1:
            raise PoolError(
                f"adapter_pages={adapter_pages}: must be in 0..{num_pages - 2}, because num_pages={num_pages} includes "
                "the dummy page and at least one page for KV"
            )
        self.num_pages = num_pages
        self.adapter_pages = adapter_pages
        self.kinds = np.full(num_pages, PageKind.FREE, np.uint8)
        self.kinds[DUMMY_PAGE] = PageKind.DUMMY
        self._stack = np.arange(num_pages - 1, 0, -1, dtype=np.int32)  # free page ids, top last
        self._num_free = num_pages - 1
        self._num_adapter_pages = 0  # allocated

    @property
    def num_free(self) -> int:
        return self._num_free

    @property
    def capacity(self) -> int:
        """Pages that can be allocated: all but the dummy page."""
        return self.num_pages - 1

    def capacity_for(self, kind: PageKind) -> int:
        """Most pages that this kind can hold."""
        if self.adapter_pages is None:
            return self.capacity
        return self.adapter_pages if kind is PageKind.ADAPTER else self.capacity - self.adapter_pages

    def shares_room(self, kind: PageKind, other: PageKind) -> bool:
        """Returns whether freeing a page of one kind lets the other kind allocate it."""
        return self.adapter_pages is None or (kind is PageKind.ADAPTER) == (other is PageKind.ADAPTER)

    def available(self, kind: PageKind) -> int:
        """Free pages that this kind can allocate."""
        if self.adapter_pages is None:
            return self._num_free
        left = self.adapter_pages - self._num_adapter_pages
        return left if kind is PageKind.ADAPTER else self._num_free - left

    def can_allocate(self, count: int, kind: PageKind) -> bool:
        return count <= self.available(kind)

    def allocate(self, count: int, kind: PageKind) -> np.ndarray:
        """Allocates `count` pages and returns their ids, int32 `[count]`.

        Raises:
          PoolError: fewer pages are free, or `count` is negative; nothing is allocated. Call `can_allocate` first.
        """
        if not 0 <= count <= self.available(kind):
            raise PoolError(f"{count} pages requested, {self.available(kind)} of {self.capacity_for(kind)} free")
        pages = self._stack[self._num_free - count : self._num_free].copy()
        self._num_free -= count
        if kind is PageKind.ADAPTER:
            self._num_adapter_pages += count
        self.kinds[pages] = kind
        return pages

    def convert(self, pages: np.ndarray, kind: PageKind) -> None:
        """Changes the kind of allocated KV or PREFIX pages."""
        self.kinds[pages] = kind

    def free(self, pages: np.ndarray) -> None:
        """Frees pages.

        Raises:
          PoolError: a page is out of range, already free, or listed twice; nothing is freed.
        """
        pages = np.asarray(pages, np.int32)
        if pages.size == 0:
            return
        if pages.min() <= DUMMY_PAGE or pages.max() >= self.num_pages:
            raise PoolError(f"free of pages {pages.min()}..{pages.max()}: must be in 1..{self.num_pages - 1}")
        kinds = self.kinds[pages]
        already = pages[kinds == PageKind.FREE]
        if already.size:
            raise PoolError(f"double free of page {int(already[0])}")
        if pages.size > 1 and np.unique(pages).size != pages.size:
            raise PoolError(f"free lists a page twice: {pages.tolist()}")
        self._stack[self._num_free : self._num_free + pages.size] = pages
        self._num_free += pages.size
        self._num_adapter_pages -= int(np.count_nonzero(kinds == PageKind.ADAPTER))
        self.kinds[pages] = PageKind.FREE

    def free_page(self, page: int) -> None:
        """Frees one KV or PREFIX page, faster than `free`. Raises PoolError if it is out of range or already free."""
        if not DUMMY_PAGE < page < self.num_pages or self.kinds.item(page) == PageKind.FREE:
            raise PoolError(f"free of page {page}: it is not allocated")
        self.kinds[page] = PageKind.FREE
        self._stack[self._num_free] = page
        self._num_free += 1

    def count(self, kind: PageKind) -> int:
        return int(np.count_nonzero(self.kinds == kind))

    def check_owned(self, owned: dict[PageKind, list[np.ndarray]]) -> None:
        """Checks the allocator's state against the owners' page lists.

        Args:
          owned: for each kind to check, the page ids of each of its owners, int32.

        Raises:
          PoolError: a page is leaked (allocated without an owner), has two owners, or is free but owned.
        """
        for kind, lists in owned.items():
            pages = np.concatenate([np.empty(0, np.int32), *lists])
            if np.unique(pages).size != pages.size:
                raise PoolError(f"a {kind.name} page has two owners")
            allocated = np.flatnonzero(self.kinds == kind)
            if not np.array_equal(np.sort(pages), allocated):
                leaked, stale = np.setdiff1d(allocated, pages).tolist(), np.setdiff1d(pages, allocated).tolist()
                raise PoolError(f"{kind.name} pages leaked: {leaked}; owned but not allocated: {stale}")
