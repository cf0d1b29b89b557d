"""The page allocator: one free list for KV and adapter pages alike (paper section 5.1, unified paging)."""

from __future__ import annotations

from enum import IntEnum

import numpy as np

from slora_jax.errors import PoolError

DUMMY_PAGE = 0
"""The page that absorbs every padded write and read. Never allocated."""


class PageKind(IntEnum):
    """What a page holds."""

    FREE = 0
    KV = 1
    """Keys and values of one running request."""
    ADAPTER = 2
    DUMMY = 3
    PREFIX = 4
    """Keys and values that the prefix cache knows, whether requests use them now or not."""


class PageAllocator:
    """Hands out page ids of a pool of `num_pages` pages, page 0 excepted.

    A stack of free ids: allocating or freeing costs O(1) a page, and because any page serves any purpose there is no
    fragmentation. `kinds` uint8 `[num_pages]` says what each page holds now (read-only for others; the pool's picture).

    adapter_pages: None, the unified pool; or how many pages are set aside for adapters, which then can use no others,
    nor others these: the fixed split of the baseline `no-unify-mem`.
    """

    def __init__(self, num_pages: int, adapter_pages: int | None = None) -> None:
        if num_pages < 2:
            raise PoolError(f"num_pages={num_pages}: a pool needs at least 2 pages, one of them the dummy page")
        if adapter_pages is not None and not 0 <= adapter_pages < num_pages - 1:
            raise PoolError(
                f"adapter_pages={adapter_pages}: must be in 0..{num_pages - 2}; of num_pages={num_pages}, one is the "
                "dummy page and one at least must be left for keys and values"
            )
        self.num_pages = num_pages
        self.adapter_pages = adapter_pages
        self.kinds = np.full(num_pages, PageKind.FREE, np.uint8)
        self.kinds[DUMMY_PAGE] = PageKind.DUMMY
        self._stack = np.arange(num_pages - 1, 0, -1, dtype=np.int32)  # the top is the end
        self._num_free = num_pages - 1
        self._adapters_held = 0

    @property
    def num_free(self) -> int:
        return self._num_free

    @property
    def capacity(self) -> int:
        """Pages that can be allocated at all: all but the dummy page."""
        return self.num_pages - 1

    def capacity_for(self, kind: PageKind) -> int:
        """Pages that this kind could have if there were no other."""
        if self.adapter_pages is None:
            return self.capacity
        return self.adapter_pages if kind is PageKind.ADAPTER else self.capacity - self.adapter_pages

    def shares_room(self, kind: PageKind, other: PageKind) -> bool:
        """Whether a page of one kind, once free, can become one of the other kind."""
        return self.adapter_pages is None or (kind is PageKind.ADAPTER) == (other is PageKind.ADAPTER)

    def available(self, kind: PageKind) -> int:
        """Free pages that this kind may have."""
        if self.adapter_pages is None:
            return self._num_free
        left = self.adapter_pages - self._adapters_held
        return left if kind is PageKind.ADAPTER else self._num_free - left

    def can_allocate(self, count: int, kind: PageKind) -> bool:
        return count <= self.available(kind)

    def allocate(self, count: int, kind: PageKind) -> np.ndarray:
        """Takes `count` pages: int32 ids `[count]`.

        Raises:
          PoolError: fewer pages are free, or `count` is negative; nothing was taken. Callers ask `can_allocate` first.
        """
        if not 0 <= count <= self.available(kind):
            raise PoolError(f"{count} pages asked for, {self.available(kind)} of {self.capacity_for(kind)} free")
        pages = self._stack[self._num_free - count : self._num_free].copy()
        self._num_free -= count
        if kind is PageKind.ADAPTER:
            self._adapters_held += count
        self.kinds[pages] = kind
        return pages

    def convert(self, pages: np.ndarray, kind: PageKind) -> None:
        """Changes what allocated pages hold, between kinds that are no adapters'."""
        self.kinds[pages] = kind

    def free(self, pages: np.ndarray) -> None:
        """Gives pages back.

        Raises:
          PoolError: a page is out of range, free already, or named twice; nothing was freed.
        """
        pages = np.asarray(pages, np.int32)
        if pages.size == 0:
            return
        if pages.min() <= DUMMY_PAGE or pages.max() >= self.num_pages:
            raise PoolError(f"free of pages {pages.min()}..{pages.max()}, outside 1..{self.num_pages - 1}")
        kinds = self.kinds[pages]
        already = pages[kinds == PageKind.FREE]
        if already.size:
            raise PoolError(f"double free of page {int(already[0])}")
        if pages.size > 1 and np.unique(pages).size != pages.size:
            raise PoolError(f"a page is named twice in one free: {pages.tolist()}")
        self._stack[self._num_free : self._num_free + pages.size] = pages
        self._num_free += pages.size
        self._adapters_held -= int(np.count_nonzero(kinds == PageKind.ADAPTER))
        self.kinds[pages] = PageKind.FREE

    def free_page(self, page: int) -> None:
        """Gives one page back that is no adapter's: `free`, in a fraction of its time.

        Raises:
          PoolError: it is out of range or free already.
        """
        if not DUMMY_PAGE < page < self.num_pages or self.kinds.item(page) == PageKind.FREE:
            raise PoolError(f"free of page {page}, which is not allocated")
        self.kinds[page] = PageKind.FREE
        self._stack[self._num_free] = page
        self._num_free += 1

    def count(self, kind: PageKind) -> int:
        return int(np.count_nonzero(self.kinds == kind))

    def check_owned(self, owned: dict[PageKind, list[np.ndarray]]) -> None:
        """Compares the allocator's view with the owners' lists of pages.

        Raises:
          PoolError: a page is leaked (allocated, but nobody's), owned twice, or owned while free.
        """
        for kind, lists in owned.items():
            mine = np.concatenate([np.empty(0, np.int32), *lists])
            if np.unique(mine).size != mine.size:
                raise PoolError(f"a {kind.name} page has two owners")
            held = np.flatnonzero(self.kinds == kind)
            if not np.array_equal(np.sort(mine), held):
                leaked, ghost = np.setdiff1d(held, mine), np.setdiff1d(mine, held)
                raise PoolError(f"{kind.name} pages leaked: {leaked.tolist()}; owned but not held: {ghost.tolist()}")
