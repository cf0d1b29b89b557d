"""Unified eviction: whatever lies in the pool unused, adapters and cached prefixes alike, competes under one policy."""

from __future__ import annotations

import heapq
import itertools
from collections.abc import Callable
from dataclasses import dataclass, field

from slora_jax.errors import ConfigError, PoolError
from slora_jax.memory.allocator import PageAllocator, PageKind
from slora_jax.metrics import Counters


@dataclass(eq=False, kw_only=True, slots=True)
class Evictable:
    """Content of the pool that may become idle.

    Attributes:
      kind, num_pages: of its pages. uses: how often it was used while in the pool.
      priority: what the policy gave it when it became idle.
      idle_since: a number that grows, 0 while it is in use.
      exposed: whether it may be evicted.
      awaited: position in the queue of the first request that waits for it, from 1; 0: none.
    """

    kind: PageKind
    num_pages: int
    uses: int = 0
    priority: float = 0.0
    idle_since: int = 0
    exposed: bool = False
    awaited: int = 0

    @property
    def idle(self) -> bool:
        return self.idle_since > 0


class EvictionPolicy:
    """The seam: what goes first when pages are wanted. `keeps_idle=False`: nothing unused stays at all."""

    keeps_idle = True

    def priority(self, item: Evictable) -> float:
        """Of an item that has just become idle; the lowest goes first, among equals the one idle for longest."""
        raise NotImplementedError

    def evicted(self, item: Evictable) -> None:
        """An idle item has to go because its pages (or slot) are wanted."""


class Immediate(EvictionPolicy):
    """S-LoRA's code: when a request ends, all adapters that no other uses leave the pool at once."""

    keeps_idle = False

    def priority(self, item: Evictable) -> float:
        return 0.0


class Lru(EvictionPolicy):
    """The least recently used goes first, whatever it is."""

    def priority(self, item: Evictable) -> float:
        return 0.0  # all equal: idle for longest first


@dataclass(frozen=True)
class RestoreCosts:
    """Seconds to restore evicted content. load: of an adapter, whatever its size. reload_page: of each of its
    pages, from host memory. recompute_page: of a page of keys and values, by prefill."""

    load: float
    reload_page: float
    recompute_page: float

    def __post_init__(self) -> None:
        for name in ("load", "reload_page", "recompute_page"):
            if not getattr(self, name) >= 0:
                raise ConfigError(f"RestoreCosts.{name}={getattr(self, name)!r}: must be at least 0 seconds")

    @classmethod
    def of(
        cls, parameters: int, page_size: int, page_bytes: int, flops: float, host_to_device: float, load: float = 1e-4
    ) -> RestoreCosts:
        """By count: a page holds `page_size` tokens, each of which takes 2 operations a parameter of the model to
        compute, at `flops` a second; or `page_bytes` of an adapter, copied at `host_to_device` bytes a second."""
        return cls(load, page_bytes / host_to_device, 2 * parameters * page_size / flops)

    def seconds(self, item: Evictable) -> float:
        if item.kind is PageKind.ADAPTER:
            return self.load + item.num_pages * self.reload_page
        return item.num_pages * self.recompute_page


@dataclass
class CostAware(EvictionPolicy):
    """Greedy-Dual-Size-Frequency (Cherkasova 1998): what costs least to restore, by page freed, weighted by how often
    it was used, goes first; and what was used lately counts more than what was not.

    `priority = age + uses * seconds to restore / pages`, where `age` is the highest priority evicted so far: an item
    that is used no more is overtaken by all that come, however dear it was.
    """

    costs: RestoreCosts
    _age: float = field(default=0.0, init=False, repr=False)

    def priority(self, item: Evictable) -> float:
        return self._age + item.uses * self.costs.seconds(item) / item.num_pages

    def evicted(self, item: Evictable) -> None:
        self._age = max(self._age, item.priority)


Entry = tuple[float, int, Evictable]
"""Of a heap: priority, since when it is idle (no two the same), and the item, if it is idle since then."""


class Evictor:
    """Tracks idle content of the pool, and evicts it in the order of the policy when pages are wanted.

    The owner of a kind of pages says how one of its items is evicted (`register`), and reports when an item becomes
    idle (`add`) and is used again (`remove`). A prefix node with children is idle but not exposed: it is evictable only
    after its children (`expose`). Every operation is logarithmic in the number of idle items.

    Idle items that waiting requests want (`await_`) are evicted last, whatever the policy, the one farthest back in the
    queue first; with `protect_awaited=True` not at all.
    """

    def __init__(self, allocator: PageAllocator, policy: EvictionPolicy, counters: Counters | None = None) -> None:
        """counters: of the engine; None: new ones."""
        self.allocator = allocator
        self.policy = policy
        self.counters = Counters() if counters is None else counters
        self._evict: dict[PageKind, Callable[[Evictable], None]] = {}
        self._heaps: dict[PageKind, list[Entry]] = {}
        self._pages: dict[PageKind, int] = {}
        self._awaited: dict[PageKind, dict[int, Evictable]] = {}  # the idle ones, by idle_since
        self._awaited_pages: dict[PageKind, int] = {}
        self._turns = itertools.count(1)

    def register(self, kind: PageKind, evict: Callable[[Evictable], None]) -> None:
        """Registers a kind of pages. `evict(item)` frees the pages of an idle item of this kind and forgets it."""
        self._evict[kind] = evict
        self._heaps[kind] = []
        self._pages[kind] = self._awaited_pages[kind] = 0
        self._awaited[kind] = {}

    def pages(self, kind: PageKind) -> int:
        """Idle pages of this kind."""
        return self._pages.get(kind, 0)

    def has_idle(self, kind: PageKind, protect_awaited: bool = False) -> bool:
        """Returns whether anything of this kind is evictable."""
        return self._top(kind) is not None or (not protect_awaited and bool(self._awaited[kind]))

    def available(self, kind: PageKind, protect_awaited: bool = False) -> int:
        """Pages that could be allocated for this kind: free ones, and idle ones that share their room."""
        return self.allocator.available(kind) + sum(
            pages - (self._awaited_pages[other] if protect_awaited else 0)
            for other, pages in self._pages.items()
            if self.allocator.shares_room(kind, other)
        )

    def can_make_room(self, kv_pages: int, adapter_pages: int, protect_awaited: bool = False) -> bool:
        """Returns whether so many pages can be allocated for keys and values and for adapters together."""
        available = self.available(PageKind.KV, protect_awaited)
        if self.allocator.shares_room(PageKind.KV, PageKind.ADAPTER):
            return kv_pages + adapter_pages <= available
        return kv_pages <= available and adapter_pages <= self.available(PageKind.ADAPTER, protect_awaited)

    def add(self, item: Evictable, exposed: bool = True) -> None:
        """Records that the item is idle. Under a policy that keeps nothing it is evicted at once, unless awaited."""
        item.idle_since = next(self._turns)
        item.priority = self.policy.priority(item)
        self._pages[item.kind] += item.num_pages
        if item.awaited:
            self._awaited[item.kind][item.idle_since] = item
            self._awaited_pages[item.kind] += item.num_pages
        elif exposed:
            self.expose(item)

    def expose(self, item: Evictable) -> None:
        """Makes this idle item evictable."""
        item.exposed = True
        if not self.policy.keeps_idle:
            self.evict(item)
            return
        heap = self._heaps[item.kind]
        heapq.heappush(heap, (item.priority, item.idle_since, item))
        if len(heap) > 64 + 2 * self._pages[item.kind]:  # mostly entries of items that are in use again
            heap[:] = [entry for entry in heap if _is_valid(entry)]
            heapq.heapify(heap)

    def await_(self, item: Evictable, position: int) -> None:
        """Sets the position, from 1, of the first request that waits for this item, idle or in use; 0: none does. Only
        for items without children."""
        if not item.idle or bool(item.awaited) == bool(position):
            item.awaited = position
            return
        self.remove(item)
        item.awaited = position
        self.add(item)

    def remove(self, item: Evictable) -> None:
        """Records that the item is in use again."""
        if self._awaited[item.kind].pop(item.idle_since, None) is not None:
            self._awaited_pages[item.kind] -= item.num_pages
        item.idle_since = 0
        item.exposed = False
        self._pages[item.kind] -= item.num_pages

    def evict(self, item: Evictable) -> None:
        """Evicts this idle item now."""
        self.remove(item)
        self._evict[item.kind](item)

    def evict_one(self, kind: PageKind, protect_awaited: bool = False) -> None:
        """Evicts the first item of this kind.

        Raises:
          PoolError: none is idle.
        """
        item = self._first([kind], protect_awaited)
        if item is None:
            raise PoolError(f"no idle {kind.name} can be evicted")
        self._evict_first(item)

    def make_room(self, count: int, kind: PageKind, protect_awaited: bool = False) -> bool:
        """Evicts until `count` pages can be allocated for `kind`, or nothing evictable is left. Returns whether they
        can."""
        kinds: list[PageKind] | None = None
        while self.allocator.available(kind) < count:
            if kinds is None:
                kinds = [other for other in self._heaps if self.allocator.shares_room(kind, other)]
            item = self._first(kinds, protect_awaited)
            if item is None:
                return False
            self._evict_first(item)
        return True

    def _first(self, kinds: list[PageKind], protect_awaited: bool) -> Evictable | None:
        """The first to go of these kinds: awaited ones only when there are no others, the farthest back first."""
        first: Entry | None = None
        for kind in kinds:
            if self._top(kind) is not None and (first is None or self._heaps[kind][0] < first):
                first = self._heaps[kind][0]
        if first is not None:
            return first[2]
        awaited = [] if protect_awaited else [item for kind in kinds for item in self._awaited[kind].values()]
        return max(awaited, key=lambda item: item.awaited, default=None)

    def _evict_first(self, item: Evictable) -> None:
        self.policy.evicted(item)
        self.evict(item)

    def _top(self, kind: PageKind) -> Evictable | None:
        """The first to go of this kind, awaited ones apart. Entries of items that are in use again are dropped."""
        heap = self._heaps[kind]
        while heap and not _is_valid(heap[0]):
            heapq.heappop(heap)
        return heap[0][2] if heap else None


def _is_valid(entry: Entry) -> bool:
    return entry[2].exposed and entry[2].idle_since == entry[1]
