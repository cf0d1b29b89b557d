"""The prefix cache against a dictionary of whole prefixes, searched from end to end."""

import numpy as np
import pytest
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from slora_jax.errors import PoolError
from slora_jax.memory import CostAware, Evictor, Immediate, Lru, PageAllocator, PageKind, PrefixCache, RestoreCosts

SIZE = 2  # tokens of a page
CAPACITY = 24
POLICIES = {"immediate": Immediate, "lru": Lru, "cost_aware": lambda: CostAware(RestoreCosts(1.0, 0.5, 3.0))}

TEXTS = ([0] * 10, [0] * 4 + [1] * 6)
digests = st.sampled_from([None, None, "a", "b"])
prompts = st.builds(
    lambda text, shared, tail: text[:shared] + tail,
    st.sampled_from(TEXTS), st.integers(0, 10), st.lists(st.integers(0, 1), min_size=1, max_size=3),
)  # fmt: skip


def as_bytes(tokens):
    return np.array(tokens, np.int32).tobytes()


class Holder:
    """A running request: its tokens, its pages so far, of which the first `depth` are the cache's."""

    def __init__(self, digest, tokens, node, pages, own):
        self.digest, self.tokens, self.node = digest, tuple(tokens), node
        self.pages, self.depth = pages + own, len(pages)

    def prefixes(self):
        return [(self.digest, self.tokens[: SIZE * k]) for k in range(1, self.depth + 1)]


class PrefixMachine(RuleBasedStateMachine):
    """Model: (digest, tokens from the first one on) -> page, and the running requests."""

    @initialize(policy=st.sampled_from(sorted(POLICIES)))
    def start(self, policy):
        self.keeps = policy != "immediate"
        self.evictor = Evictor(PageAllocator(CAPACITY + 1), POLICIES[policy]())
        self.cache = PrefixCache(self.evictor, SIZE)
        self.model: dict[tuple, int] = {}
        self.running: list[Holder] = []

    def in_use(self):
        return {key for holder in self.running for key in holder.prefixes()}

    def longest(self, digest, tokens, most):
        """Pages that a request with these tokens could share."""
        depth = 0
        while depth < most and (digest, tuple(tokens[: SIZE * (depth + 1)])) in self.model:
            depth += 1
        return depth

    def forget_unused(self, digests=(None, "a", "b")):
        used = self.in_use()
        self.model = {key: page for key, page in self.model.items() if key in used or key[0] not in digests}

    def make_room(self, count):
        """Evicts as many idle pages as are missing, never one that another prefix rests upon."""
        idle = self.model.keys() - self.in_use()
        free = self.evictor.allocator.num_free
        possible = count <= free + len(idle)
        assert self.evictor.available(PageKind.KV) == free + len(idle)
        assert self.evictor.make_room(count, PageKind.KV) == possible
        left = set(self.cache.pages().tolist())
        gone = {key for key, page in self.model.items() if page not in left}
        assert gone <= idle and len(gone) == min(max(0, count - free), len(idle))
        for key in gone:
            del self.model[key]
        return possible

    @rule(digest=digests, tokens=prompts)
    def admit(self, digest, tokens):
        """Like the scheduler: matches all but the last token, acquires the shared node, allocates pages for the
        rest."""
        most = (len(tokens) - 1) // SIZE
        node = self.cache.match(digest, as_bytes(tokens), most)
        depth = self.longest(digest, tokens, most)
        assert (0 if node is None else node.depth) == depth
        keys = [(digest, tuple(tokens[: SIZE * k])) for k in range(1, depth + 1)]
        idle = len(set(keys) - self.in_use())
        assert self.cache.idle_pages(node) == idle
        own = -(-len(tokens) // SIZE) - depth
        if own + idle > self.evictor.available(PageKind.KV):
            return
        pages = [] if node is None else self.cache.acquire(node)
        assert pages == [self.model[key] for key in keys]
        holder = Holder(digest, tokens, node, pages, [])
        self.running.append(holder)
        assert self.make_room(own)
        holder.pages += self.evictor.allocator.allocate(own, PageKind.KV).tolist()

    @rule(tokens=prompts)
    def admit_twins(self, tokens):
        """Neither finds the other's pages: they will hold the same contents twice."""
        self.admit(None, tokens)
        self.admit(None, tokens)

    @precondition(lambda self: self.running)
    @rule(data=st.data())
    def extend(self, data):
        holder = data.draw(st.sampled_from(self.running))
        end = data.draw(st.integers(holder.depth, len(holder.tokens) // SIZE))
        pages = holder.pages[holder.depth : end]
        holder.node = self.cache.extend(holder.node, holder.digest, as_bytes(holder.tokens), pages)
        for page in pages:
            key = (holder.digest, holder.tokens[: SIZE * (holder.depth + 1)])
            if key in self.model:
                break
            self.model[key] = page
            holder.depth += 1
        assert (0 if holder.node is None else holder.node.depth) == holder.depth

    @precondition(lambda self: self.running)
    @rule(data=st.data())
    def release(self, data):
        holder = data.draw(st.sampled_from(self.running))
        self.running.remove(holder)
        self.evictor.allocator.free(np.array(holder.pages[holder.depth :], np.int32))
        if holder.node is not None:
            self.cache.release(holder.node)
        if not self.keeps:
            self.forget_unused()

    @rule(digest=digests)
    def drop(self, digest):
        self.cache.drop(digest)
        self.forget_unused((digest,))

    @rule(count=st.integers(0, CAPACITY))
    def want_room(self, count):
        self.make_room(count)

    @rule(digest=digests, tokens=prompts, most=st.integers(0, 6))
    def match(self, digest, tokens, most):
        node = self.cache.match(digest, as_bytes(tokens), most)
        assert (0 if node is None else node.depth) == self.longest(digest, tokens, min(most, len(tokens) // SIZE))

    @invariant()
    def books_agree(self):
        if not hasattr(self, "cache"):
            return
        assert sorted(self.cache.pages().tolist()) == sorted(self.model.values())
        assert self.evictor.pages(PageKind.PREFIX) == len(self.model.keys() - self.in_use())
        self.cache.check([holder.node for holder in self.running if holder.node is not None])
        own = [np.array(holder.pages[holder.depth :], np.int32) for holder in self.running]
        self.evictor.allocator.check_owned({PageKind.KV: own, PageKind.PREFIX: [self.cache.pages()]})


TestPrefixCache = PrefixMachine.TestCase


@pytest.fixture
def cache():
    return PrefixCache(Evictor(PageAllocator(CAPACITY + 1), Lru()), SIZE)


def hold(cache, tokens, digest=None):
    """Registers all full pages of a request. Returns its deepest node."""
    node = cache.match(digest, as_bytes(tokens), len(tokens) // SIZE)
    depth = 0 if node is None else node.depth
    if node is not None:
        cache.acquire(node)
    pages = cache.evictor.allocator.allocate(len(tokens) // SIZE - depth, PageKind.KV).tolist()
    return cache.extend(node, digest, as_bytes(tokens), pages)


def test_token_ids_are_compared_in_full(cache):
    """Ids that differ in one byte are different tokens; no hash is involved."""
    hold(cache, [1, 2, 3, 4])
    for other in ([1, 2, 3, 5], [257, 2, 3, 4], [1 + (1 << 16), 2, 3, 4], [1 + (1 << 24), 2, 3, 4], [2, 1, 3, 4]):
        assert (found := cache.match(None, as_bytes(other), 2)) is None or found.depth == 1
    assert cache.match("a", as_bytes([1, 2, 3, 4]), 2) is None


def test_least_recently_used_leaf_is_evicted_first_and_a_shared_prefix_last(cache):
    first, second = hold(cache, [0, 0, 1, 1]), hold(cache, [0, 0, 2, 2])
    cache.release(second)
    cache.release(first)
    for room in (22, 23, 24):
        cache.evictor.make_room(room, PageKind.KV)
        depths = [m.depth if (m := cache.match(None, as_bytes(t), 2)) else 0 for t in ([0, 0, 1, 1], [0, 0, 2, 2])]
        assert depths == {22: [2, 1], 23: [1, 1], 24: [0, 0]}[room]


def test_forget_drops_unwritten_pages_and_keeps_written_ones(cache):
    node = hold(cache, [1, 2, 3, 4, 5, 6])
    other = hold(cache, [1, 2, 9, 9])
    cache.release(node)
    cache.release(other)
    cache.forget(node, 1)
    assert cache.match(None, as_bytes([1, 2, 3, 4]), 2).depth == 1
    assert cache.match(None, as_bytes([1, 2, 9, 9]), 2) is other
    cache.forget(node, 1)  # a no-op
    cache.check([])


def test_a_chain_as_long_as_a_long_context_is_dropped(cache):
    """The chain is deeper than Python's recursion limit."""
    cache = PrefixCache(Evictor(PageAllocator(5001), Lru()), SIZE)
    node = hold(cache, list(range(10_000)))
    cache.release(node)
    cache.drop(None)
    assert cache.evictor.allocator.num_free == 5000
    assert not cache._roots


def test_releasing_an_unused_node_is_refused(cache):
    node = hold(cache, [1, 2])
    cache.release(node)
    with pytest.raises(PoolError, match="not in use"):
        cache.release(node)


def test_check_finds_a_missing_user(cache):
    node = hold(cache, [1, 2, 3, 4])
    cache.check([node])
    with pytest.raises(PoolError, match="0 requests hold it, its users=1"):
        cache.check([])


def test_adapter_that_acts_later_branches_off_the_base_models_pages(cache):
    tokens, allocate = as_bytes([1, 2, 3, 4, 5, 6]), cache.evictor.allocator.allocate

    def add(digest, start):
        node = cache.match(digest, tokens, 3, start)
        depth = 0 if node is None else node.depth
        if node is not None:
            cache.acquire(node)
        pages = allocate(3 - depth, PageKind.KV).tolist()
        node = cache.extend(node, digest, tokens, pages, start)
        cache.release(node)
        return depth

    assert add("a", start=3) == 0
    assert add("b", start=3) == add(None, start=0) == 1  # the page before the one of token 3
    assert add("a", start=2) == 1  # begins elsewhere in the same page
    assert [cache.match(d, tokens, 3, s).depth for d, s in (("a", 3), ("a", 2), ("b", 3), (None, 0))] == [3] * 4
    assert add("a", start=0) == 0  # acts on every token
    cache.check([])
    cache.drop("a")
    assert cache.match("a", tokens, 3) is None
    assert [cache.match(d, tokens, 3, s).depth for d, s in (("a", 3), ("a", 2), ("b", 3), (None, 0))] == [1, 1, 3, 3]
    cache.drop("b")
    cache.drop(None)
    assert cache.evictor.allocator.num_free == cache.evictor.allocator.capacity
    assert not cache._branches and not cache._roots
