"""The evictor compared with a list, and each policy with its rule written out."""

import numpy as np
import pytest
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from slora_jax.errors import ConfigError, PoolError
from slora_jax.memory import CostAware, Evictor, Immediate, Lru, PageAllocator, PageKind, RestoreCosts
from slora_jax.memory.eviction import Evictable

COSTS = RestoreCosts(load=1.0, reload_page=0.5, recompute_page=3.0)
KINDS = (PageKind.ADAPTER, PageKind.PREFIX)


class Item(Evictable):
    """Pages that were used. A prefix cannot be evicted before its children."""

    __slots__ = ("children", "pages", "parent")

    def __init__(self, kind, pages, parent=None):
        super().__init__(kind=kind, num_pages=pages.size)
        self.pages, self.parent, self.children = pages, parent, 0


class EvictorMachine(RuleBasedStateMachine):
    """Model: a list of all idle items with the priority of the rule."""

    @initialize(policy=st.sampled_from(["lru", "cost_aware"]), split=st.booleans())
    def start(self, policy, split):
        self.policy = {"lru": Lru(), "cost_aware": CostAware(COSTS)}[policy]
        self.allocator = PageAllocator(31, 12 if split else None)
        self.evictor = Evictor(self.allocator, self.policy)
        self.used: list[Item] = []
        self.idle: list[tuple[float, Item]] = []  # (priority, item), idle for longest first
        self.gone: list[Item] = []
        self.age = 0.0
        for kind in KINDS:
            self.evictor.register(kind, self.forget)

    def forget(self, item):
        self.allocator.free(item.pages)
        self.gone.append(item)
        if item.parent is not None:
            item.parent.children -= 1
            if item.parent.idle and not item.parent.children:
                self.evictor.expose(item.parent)

    def priority(self, item):
        if isinstance(self.policy, Lru):
            return 0.0
        restore = 1.0 + 0.5 * item.num_pages if item.kind is PageKind.ADAPTER else 3.0 * item.num_pages
        return self.age + item.uses * restore / item.num_pages

    def expected(self, kinds):
        """Returns the next victim of these kinds: lowest priority, then longest idle, without children."""
        free = [(p, i, item) for i, (p, item) in enumerate(self.idle) if item.kind in kinds and not self.children(item)]
        return min(free, default=None, key=lambda entry: entry[:2])

    def children(self, item):
        return any(other.parent is item for _, other in self.idle) or any(other.parent is item for other in self.used)

    @rule(kind=st.sampled_from(KINDS), size=st.integers(1, 5), rest=st.booleans())
    def take(self, kind, size, rest):
        size = 1 if kind is PageKind.PREFIX else size
        if not self.allocator.can_allocate(size, kind):
            return
        parents = [item for item in self.used if item.kind is PageKind.PREFIX]
        parent = parents[-1] if rest and parents and kind is PageKind.PREFIX else None
        item = Item(kind, self.allocator.allocate(size, kind), parent)
        if parent is not None:
            parent.children += 1
        item.uses = 1
        self.used.append(item)

    @precondition(lambda self: self.used)
    @rule(data=st.data())
    def release(self, data):
        """A request releases children before their parents."""
        leaves = [i for i in self.used if not any(other.parent is i for other in self.used)]
        item = data.draw(st.sampled_from(leaves))
        self.used.remove(item)
        self.idle.append((self.priority(item), item))
        self.evictor.add(item, exposed=not item.children)

    @precondition(lambda self: self.idle)
    @rule(data=st.data())
    def use_again(self, data):
        """With all its ancestors."""
        item = data.draw(st.sampled_from([item for _, item in self.idle]))
        while item is not None and item.idle:
            self.idle = [entry for entry in self.idle if entry[1] is not item]
            self.evictor.remove(item)
            item.uses += 1
            self.used.append(item)
            item = item.parent

    @rule(count=st.integers(0, 31), kind=st.sampled_from((*KINDS, PageKind.KV)))
    def make_room(self, count, kind):
        shared = [k for k in KINDS if self.allocator.shares_room(kind, k)]
        available, victims = self.allocator.available(kind), []
        while available < count and (entry := self.expected(shared)) is not None:
            priority, at, item = entry
            self.age = max(self.age, priority)
            del self.idle[at]
            victims.append(item)
            available += item.num_pages
        available = self.evictor.available(kind)
        before = len(self.gone)
        assert self.evictor.make_room(count, kind) == (available >= count) == (available >= count)
        assert self.gone[before:] == victims

    @invariant()
    def books_agree(self):
        for kind in KINDS:
            idle = [item for _, item in self.idle if item.kind is kind]
            assert self.evictor.pages(kind) == sum(item.num_pages for item in idle)
            assert self.evictor.has_idle(kind) == bool(idle)
        assert all(item.idle for _, item in self.idle) and not any(item.idle for item in self.used)


TestEvictor = EvictorMachine.TestCase


def evictor_of(policy, pages=30):
    evictor = Evictor(PageAllocator(pages + 1), policy)
    gone = []

    def forget(item):
        evictor.allocator.free(item.pages)
        gone.append(item)

    for kind in KINDS:
        evictor.register(kind, forget)
    return evictor, gone


def item_of(evictor, kind, size, uses=1):
    item = Item(kind, evictor.allocator.allocate(size, kind))
    item.uses = uses
    return item


def test_immediate_evicts_at_once():
    evictor, gone = evictor_of(Immediate())
    item = item_of(evictor, PageKind.ADAPTER, 4)
    evictor.add(item)
    assert gone == [item] and evictor.allocator.num_free == 30 and not evictor.pages(PageKind.ADAPTER)


@pytest.mark.parametrize("policy", [Immediate, Lru, lambda: CostAware(COSTS)])
def test_awaited_items_are_evicted_last_and_the_farthest_in_the_queue_first(policy):
    evictor, gone = evictor_of(policy())
    near, far, unwanted = (item_of(evictor, PageKind.ADAPTER, size) for size in (4, 5, 6))
    evictor.await_(near, 1)  # in use still
    for item in (near, far, unwanted):
        item.uses = 9 if item is unwanted else 0
        evictor.await_(far, 7)
        evictor.add(item)
    if isinstance(evictor.policy, Immediate):
        assert gone == [unwanted]
    assert evictor.available(PageKind.KV) == 30 and evictor.available(PageKind.KV, protect_awaited=True) == 21
    assert not evictor.make_room(22, PageKind.KV, protect_awaited=True) and gone == [unwanted]
    assert not evictor.has_idle(PageKind.ADAPTER, protect_awaited=True) and evictor.has_idle(PageKind.ADAPTER)
    with pytest.raises(PoolError, match="no idle ADAPTER"):
        evictor.evict_one(PageKind.ADAPTER, protect_awaited=True)
    assert evictor.make_room(30, PageKind.KV) and gone == [unwanted, far, near]


@pytest.mark.parametrize("policy", [Immediate, Lru])
def test_item_no_longer_awaited_is_an_ordinary_idle_item(policy):
    evictor, gone = evictor_of(policy())
    item = item_of(evictor, PageKind.ADAPTER, 4)
    evictor.await_(item, 3)
    evictor.add(item)
    for position in (1, 5, 2):
        evictor.await_(item, position)
    assert not gone and evictor.pages(PageKind.ADAPTER) == 4
    evictor.await_(item, 0)
    assert gone == ([item] if policy is Immediate else [])
    assert evictor.make_room(30, PageKind.KV, protect_awaited=True) and gone == [item]


def test_cost_aware_keeps_expensive_and_popular_items():
    """A page of keys costs 3 s to recompute; a page of a large adapter 0.6 s to reload, of a small one 1.5 s."""
    evictor, gone = evictor_of(CostAware(COSTS))
    large, small = item_of(evictor, PageKind.ADAPTER, 10), item_of(evictor, PageKind.ADAPTER, 1)
    prefix, popular = item_of(evictor, PageKind.PREFIX, 1), item_of(evictor, PageKind.ADAPTER, 10, uses=9)
    for item in (popular, prefix, small, large):  # the most expensive one, idle for longest
        evictor.add(item)
    evictor.make_room(30, PageKind.KV)
    assert gone == [large, small, prefix, popular]


def test_cost_aware_forgets_past_popularity():
    evictor, gone = evictor_of(CostAware(COSTS))
    popular = item_of(evictor, PageKind.ADAPTER, 10, uses=9)  # 5.4 s a page
    evictor.add(popular)
    for _ in range(40):  # one use each, but later and later
        evictor.add(item_of(evictor, PageKind.ADAPTER, 10))
        evictor.make_room(10, PageKind.ADAPTER)
    assert popular in gone


def test_the_heap_does_not_grow_with_use():
    evictor, _ = evictor_of(Lru())
    item = item_of(evictor, PageKind.ADAPTER, 2)
    for _ in range(10_000):
        evictor.add(item)
        evictor.remove(item)
    assert sum(map(len, evictor._heaps.values())) < 200


def test_evicting_without_idle_items_is_refused():
    evictor, _ = evictor_of(Lru())
    with pytest.raises(PoolError, match="no idle ADAPTER"):
        evictor.evict_one(PageKind.ADAPTER)


def test_costs_by_count():
    """A page of Llama-7B: 16 tokens of 2 x 6.7e9 operations, or 8 MiB over PCIe."""
    costs = RestoreCosts.of(6_700_000_000, 16, 8 << 20, flops=134e12, host_to_device=25e9, load=0.0)
    np.testing.assert_allclose([costs.recompute_page, costs.reload_page], [1.6e-3, 3.355e-4], rtol=1e-3)
    with pytest.raises(ConfigError, match="RestoreCosts.load=-1"):
        RestoreCosts(-1, 0, 0)
