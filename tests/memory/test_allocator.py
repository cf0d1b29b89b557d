"""The page allocator compared with a set of free pages and a list of owners."""

import numpy as np
import pytest
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from slora_jax.errors import PoolError
from slora_jax.memory import DUMMY_PAGE, PageAllocator, PageKind

KINDS = st.sampled_from([PageKind.KV, PageKind.ADAPTER])


class AllocatorMachine(RuleBasedStateMachine):
    """Model: `free` is the set of free pages, `holders` the allocations and their pages."""

    @initialize(num_pages=st.integers(2, 40), split=st.none() | st.floats(0, 1))
    def start(self, num_pages, split):
        self.adapter_pages = None if split is None or num_pages == 2 else int(split * (num_pages - 3))
        self.allocator = PageAllocator(num_pages, self.adapter_pages)
        self.free = set(range(1, num_pages))
        self.holders: list[tuple[PageKind, np.ndarray]] = []

    def room(self, kind) -> int:
        """Returns the pages available to this kind: all free ones, or the rest of its own side."""
        if self.adapter_pages is None:
            return len(self.free)
        held = sum(pages.size for k, pages in self.holders if k == kind)
        side = self.adapter_pages if kind == PageKind.ADAPTER else self.allocator.capacity - self.adapter_pages
        return side - held

    def refuse(self, call, *args):
        """Checks that the call raises and changes nothing."""
        before = self.allocator.kinds.copy()
        with pytest.raises(PoolError):
            call(*args)
        np.testing.assert_array_equal(self.allocator.kinds, before)

    @rule(data=st.data(), kind=KINDS)
    def allocate(self, data, kind):
        count = data.draw(st.integers(0, self.room(kind)), "count")
        assert self.allocator.can_allocate(count, kind)
        pages = self.allocator.allocate(count, kind)
        assert pages.dtype == np.int32 and pages.shape == (count,)
        taken = set(pages.tolist())
        assert len(taken) == count and taken <= self.free  # never the dummy page or a page in use
        self.free -= taken
        self.holders.append((kind, pages))

    @rule(excess=st.integers(1, 50), kind=KINDS)
    def allocate_too_many(self, excess, kind):
        assert not self.allocator.can_allocate(self.room(kind) + excess, kind)
        self.refuse(self.allocator.allocate, self.room(kind) + excess, kind)

    @rule(kind=KINDS)
    def allocate_a_negative_number(self, kind):
        self.refuse(self.allocator.allocate, -1, kind)

    @precondition(lambda self: self.holders)
    @rule(data=st.data())
    def free_all_or_some_of_an_allocation(self, data):
        kind, pages = self.holders.pop(data.draw(st.integers(0, len(self.holders) - 1), "which"))
        keep = data.draw(st.integers(0, pages.size), "keep")
        order = np.array(data.draw(st.permutations(range(pages.size)), "order"), np.int64)
        self.allocator.free(pages[order[keep:]])
        self.free |= set(pages[order[keep:]].tolist())
        self.holders.append((kind, pages[order[:keep]]))

    @precondition(lambda self: self.free)
    @rule(data=st.data())
    def free_twice(self, data):
        page = data.draw(st.sampled_from(sorted(self.free)), "free page")
        held = np.concatenate([[], *(pages for _, pages in self.holders)]).astype(np.int32)
        self.refuse(self.allocator.free, np.array([*held, page]))  # one invalid page, and no other page is freed

    @precondition(lambda self: any(pages.size for _, pages in self.holders))
    @rule(data=st.data())
    def free_a_page_named_twice(self, data):
        pages = data.draw(st.sampled_from([pages for _, pages in self.holders if pages.size]), "pages")
        self.refuse(self.allocator.free, np.append(pages, pages[0]))

    @rule(data=st.data())
    def free_a_page_outside_the_pool(self, data):
        outside = st.sampled_from([DUMMY_PAGE, -1, self.allocator.num_pages, self.allocator.num_pages + 7])
        self.refuse(self.allocator.free, np.array([data.draw(outside, "page")]))

    @rule()
    def free_nothing(self):
        self.allocator.free(np.empty(0, np.int32))

    @rule(data=st.data())
    def own_too_few_or_too_many_pages(self, data):
        """`check_owned` detects an owner that lost a page or claims one that it does not hold."""
        owned = self.owned()
        kind = data.draw(KINDS, "kind")
        if self.free and data.draw(st.booleans(), "claim a free page"):
            owned[kind].append(np.array([data.draw(st.sampled_from(sorted(self.free)), "free page")], np.int32))
        elif any(pages.size for pages in owned[kind]):
            if data.draw(st.booleans(), "own twice"):
                owned[kind] += owned[kind]
            else:
                owned[kind] = [np.concatenate(owned[kind])[1:]]
        else:
            return
        with pytest.raises(PoolError):
            self.allocator.check_owned(owned)

    def owned(self) -> dict[PageKind, list[np.ndarray]]:
        return {k: [p for kind, p in self.holders if kind == k] for k in (PageKind.KV, PageKind.ADAPTER)}

    @invariant()
    def books_agree(self):
        allocator = self.allocator
        assert allocator.num_free == len(self.free) == allocator.count(PageKind.FREE)
        assert allocator.capacity == allocator.num_pages - 1
        assert all(allocator.available(kind) == self.room(kind) for kind in (PageKind.KV, PageKind.ADAPTER))
        assert allocator.kinds[DUMMY_PAGE] == PageKind.DUMMY and allocator.count(PageKind.DUMMY) == 1
        for kind, lists in self.owned().items():
            assert allocator.count(kind) == sum(pages.size for pages in lists)
            for pages in lists:
                assert (allocator.kinds[pages] == kind).all()
        allocator.check_owned(self.owned())


TestAllocator = AllocatorMachine.TestCase


def test_pool_without_usable_pages_is_refused():
    for num_pages in (0, 1):
        with pytest.raises(PoolError, match=f"num_pages={num_pages}: a pool needs at least 2 pages"):
            PageAllocator(num_pages)


@pytest.mark.parametrize("adapter_pages", [-1, 9, 10])
def test_split_without_kv_pages_is_refused(adapter_pages):
    with pytest.raises(PoolError, match=f"adapter_pages={adapter_pages}: must be in 0..8"):
        PageAllocator(10, adapter_pages)


def test_caller_may_change_the_returned_ids():
    allocator = PageAllocator(6)
    pages = allocator.allocate(3, PageKind.KV)
    mine = set(pages.tolist())
    pages[:] = 1
    allocator.free(np.array(sorted(mine)))
    assert set(allocator.allocate(5, PageKind.KV).tolist()) == {1, 2, 3, 4, 5}
