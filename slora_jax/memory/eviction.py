"""Unified eviction: idle adapters and idle cached prefixes compete for pages under one policy."""

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
    """Content of the pool that can be evicted while idle: an adapter or a prefix page.

    Attributes:
      kind: kind of its pages.
      num_pages: number of its pages.
      uses: how often it has been used since it entered the pool.
      priority: value that the policy gave it when it became idle.
      idle_since: sequence number of the moment it became idle; 0 while it is in use.
      exposed: whether it may be evicted.
      awaited: queue position, from 1, of the first waiting request that needs it; 0 if there is none.
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
    """The order in which idle content is evicted when pages run out; subclass it to try another one."""

    keeps_idle = True
    """False evicts content as soon as it becomes idle."""

    def priority(self, item: Evictable) -> float:
        """Returns the priority of an item that has just become idle. The lowest is evicted first; on a tie, the one
        idle for longest."""
        raise NotImplementedError

    def evicted(self, item: Evictable) -> None:
        """Called before an idle item is evicted because its pages or slot are needed."""


class Immediate(EvictionPolicy):
    """Evicts an adapter as soon as no running request uses it, as S-LoRA's code does."""

    keeps_idle = False

    def priority(self, item: Evictable) -> float:
        return 0.0


class Lru(EvictionPolicy):
    """Evicts the least recently used item first, of either kind."""

    def priority(self, item: Evictable) -> float:
        return 0.0  # ties are broken by idle time


@dataclass(frozen=True)
class RestoreCosts:
    """Seconds to restore evicted content.

    Attributes:
      load: fixed seconds per adapter upload.
      reload_page: seconds to copy one adapter page from host memory.
      recompute_page: seconds to recompute one page of KV by prefill.
    """

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
        """Estimates the costs from hardware rates: 2 operations per parameter and token to recompute a KV page.

        Args:
          parameters: parameters of the base model.
          page_size: tokens per KV page.
          page_bytes: bytes per page, over all layers.
          flops: operations per second of prefill.
          host_to_device: bytes per second of the host-to-device copy.
          load: fixed seconds per adapter upload.
        """
        return cls(load, page_bytes / host_to_device, 2 * parameters * page_size / flops)

    def seconds(self, item: Evictable) -> float:
        if item.kind is PageKind.ADAPTER:
            return self.load + item.num_pages * self.reload_page
        return item.num_pages * self.recompute_page


@dataclass
class CostAware(EvictionPolicy):
    """Greedy-Dual-Size-Frequency (Cherkasova 1998): evicts rarely used items that are cheap to restore per page first.

    `priority = age + uses * seconds to restore / pages`, where `age` is the highest priority evicted so far. Because
    `age` grows, an item that is no longer used is evicted eventually, however expensive it is.
    """

    costs: RestoreCosts
    _age: float = field(default=0.0, init=False, repr=False)

    def priority(self, item: Evictable) -> float:
        return self._age + item.uses * self.costs.seconds(item) / item.num_pages

    def evicted(self, item: Evictable) -> None:
        self._age = max(self._age, item.priority)


Entry = tuple[float, int, Evictable]
"""Heap entry: (priority, idle_since, item). `idle_since` is unique; the entry is stale if the item's has changed."""


class Evictor:
    """Tracks idle content of the pool and evicts it in the policy's order when pages are needed.

    The owner of each kind of page registers how to evict an item (`register`) and reports when an item becomes idle
    (`add`) or is used again (`remove`). A prefix node with children is idle but not evictable until its children are
    evicted (`expose`). Every operation is logarithmic in the number of idle items.

    Idle items that waiting requests need (`await_`) are evicted last under every policy, starting with the item whose
    request is farthest back in the queue. With `protect_awaited=True` they are not evicted.
    """

    def __init__(self, allocator: PageAllocator, policy: EvictionPolicy, counters: Counters | None = None) -> None:
        self.allocator = allocator
        self.policy = policy
        self.counters = Counters() if counters is None else counters
        self._evict: dict[PageKind, Callable[[Evictable], None]] = {}
        self._heaps: dict[PageKind, list[Entry]] = {}
        self._pages: dict[PageKind, int] = {}
        self._awaited: dict[PageKind, dict[int, Evictable]] = {}  # idle awaited items by idle_since
        self._awaited_pages: dict[PageKind, int] = {}
        self._turns = itertools.count(1)

    def register(self, kind: PageKind, evict: Callable[[Evictable], None]) -> None:
        """Registers a kind of page. `evict(item)` must free an idle item's pages and drop its owner's references."""
        self._evict[kind] = evict
        self._heaps[kind] = []
        self._pages[kind] = self._awaited_pages[kind] = 0
        self._awaited[kind] = {}

    def pages(self, kind: PageKind) -> int:
        """Idle pages of this kind."""
        return self._pages.get(kind, 0)

    def has_idle(self, kind: PageKind, protect_awaited: bool = False) -> bool:
        """Returns whether an item of this kind can be evicted."""
        return self._top(kind) is not None or (not protect_awaited and bool(self._awaited[kind]))

    def available(self, kind: PageKind, protect_awaited: bool = False) -> int:
        """Pages that this kind could allocate: free pages, and idle pages that it could reuse."""
        return self.allocator.available(kind) + sum(
            pages - (self._awaited_pages[other] if protect_awaited else 0)
            for other, pages in self._pages.items()
            if self.allocator.shares_room(kind, other)
        )

    def can_make_room(self, kv_pages: int, adapter_pages: int, protect_awaited: bool = False) -> bool:
        """Returns whether `kv_pages` and `adapter_pages` can be allocated together, with eviction."""
        available = self.available(PageKind.KV, protect_awaited)
        if self.allocator.shares_room(PageKind.KV, PageKind.ADAPTER):
            return kv_pages + adapter_pages <= available
        return kv_pages <= available and adapter_pages <= self.available(PageKind.ADAPTER, protect_awaited)

    def add(self, item: Evictable, exposed: bool = True) -> None:
        """Records that the item is idle. With `keeps_idle=False` it is evicted at once unless awaited."""
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
        if len(heap) > 64 + 2 * self._pages[item.kind]:  # mostly stale entries
            heap[:] = [entry for entry in heap if _is_valid(entry)]
            heapq.heapify(heap)

    def await_(self, item: Evictable, position: int) -> None:
        """Sets `item.awaited` of an idle or used item without children: the queue position from 1, or 0 for none."""
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
        """Evicts the first item of this kind in eviction order. Raises PoolError if none is evictable."""
        item = self._first([kind], protect_awaited)
        if item is None:
            raise PoolError(f"no idle {kind.name} can be evicted")
        self._evict_first(item)

    def make_room(self, count: int, kind: PageKind, protect_awaited: bool = False) -> bool:
        """Evicts idle items until `kind` can allocate `count` pages. Returns False if nothing evictable is left."""
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
        """Next item of these kinds to evict: if only awaited ones are left, the one farthest back in the queue."""
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
        """Next item of this kind to evict, not counting awaited ones. Drops stale heap entries."""
        heap = self._heaps[kind]
        while heap and not _is_valid(heap[0]):
            heapq.heappop(heap)
        return heap[0][2] if heap else None


def _is_valid(entry: Entry) -> bool:
    return entry[2].exposed and entry[2].idle_since == entry[1]
