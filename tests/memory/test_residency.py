"""Adapter residency compared with a model: users by digest, and idle adapters in the order in which they became
idle."""

import numpy as np
import pytest
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from slora_jax.errors import PoolError
from slora_jax.memory import AdapterResidency, Evictor, Lru, PageAllocator, PageKind

PAGES = {"a": 1, "b": 1, "c": 2, "d": 3, "e": 5, "f": 8, "g": 13, "h": 40}
"""Digest -> pages of the adapter; `h` is larger than most of the pools."""
DIGESTS = st.sampled_from(sorted(PAGES))


def ranks_of(digest: str) -> np.ndarray:
    return np.full(7, PAGES[digest], np.int32)


class ResidencyMachine(RuleBasedStateMachine):
    """KV pages come and go beside the adapters, from the same allocator."""

    @initialize(capacity=st.integers(1, 24), num_slots=st.integers(1, 6))
    def start(self, capacity, num_slots):
        self.allocator = PageAllocator(capacity + 1)
        self.evictor = Evictor(self.allocator, Lru())
        self.residency = AdapterResidency(self.evictor, num_slots)
        self.capacity, self.num_slots = capacity, num_slots
        self.users: dict[str, int] = {}
        self.idle: list[str] = []  # least recently used first
        self.kv: list[np.ndarray] = []
        self.loads = self.hits = self.evictions = 0

    @property
    def free(self) -> int:
        return self.capacity - sum(pages.size for pages in self.kv) - sum(PAGES[d] for d in self.users)

    def victims(self, pages: int, slots: int) -> list[str] | None:
        """Returns the fewest idle adapters, oldest first, whose eviction frees `pages` and `slots`; None if none do."""
        for count in range(len(self.idle) + 1):
            gone = self.idle[:count]
            if self.free + sum(PAGES[d] for d in gone) >= pages and self.num_slots - len(self.users) + count >= slots:
                return gone
        return None

    def forget(self, digests: list[str]) -> None:
        for digest in digests:
            self.idle.remove(digest)
            assert self.users.pop(digest) == 0
            self.evictions += 1

    @rule(digest=DIGESTS)
    def acquire(self, digest):
        residency, pages = self.residency, PAGES[digest]
        fits = residency.can_acquire(digest) and (
            self.evictor.can_make_room(0, residency.pages_to_admit(digest, pages))
        )
        if digest in self.users:
            assert fits and residency.pages_to_admit(digest, pages) == (0 if self.users[digest] else pages)
            resident, new = residency.acquire(digest, ranks_of(digest), pages)
            assert not new
            self.hits += 1
            if digest in self.idle:
                self.idle.remove(digest)
            self.users[digest] += 1
        elif (victims := self.victims(pages, 1)) is not None:
            assert fits  # the scheduler asks this before it admits
            resident, new = residency.acquire(digest, ranks_of(digest), pages)
            assert new
            self.loads += 1
            self.forget(victims)
            self.users[digest] = 1
        else:
            assert not fits
            with pytest.raises(PoolError):
                residency.acquire(digest, ranks_of(digest), pages)
            assert digest not in residency
            self.forget([d for d in self.idle if d not in residency])  # only idle ones may be evicted
            return
        assert resident.digest == digest and self.residency.users[digest] == self.users[digest]
        assert resident.pages.size == pages and (self.allocator.kinds[resident.pages] == PageKind.ADAPTER).all()
        np.testing.assert_array_equal(resident.ranks, ranks_of(digest))

    @precondition(lambda self: any(self.users.values()))
    @rule(data=st.data())
    def release(self, data):
        digest = data.draw(st.sampled_from(sorted(d for d, users in self.users.items() if users)), "digest")
        self.residency.release(digest)
        self.users[digest] -= 1
        if not self.users[digest]:
            self.idle.append(digest)

    @rule(digest=DIGESTS)
    def release_what_is_not_in_use(self, digest):
        if not self.users.get(digest):
            with pytest.raises(PoolError, match="not in use"):
                self.residency.release(digest)

    @rule(digest=DIGESTS)
    def drop(self, digest):
        """Evicts an idle adapter; keeps one in use."""
        assert self.residency.drop(digest) == (not self.users.get(digest))
        if digest in self.idle:
            self.forget([digest])

    @rule(count=st.integers(0, 26))
    def make_room(self, count):
        self.evictor.make_room(count, PageKind.KV)
        victims = self.victims(count, 0)
        self.forget(list(self.idle) if victims is None else victims)

    @rule(data=st.data())
    def take_kv_pages(self, data):
        count = data.draw(st.integers(0, min(self.free, 6)), "count")
        self.kv.append(self.allocator.allocate(count, PageKind.KV))

    @precondition(lambda self: self.kv)
    @rule(data=st.data())
    def free_kv_pages(self, data):
        self.allocator.free(self.kv.pop(data.draw(st.integers(0, len(self.kv) - 1), "which")))

    @invariant()
    def books_agree(self):
        residency, residents = self.residency, self.residency.residents
        in_use = {digest: users for digest, users in self.users.items() if users}
        assert residency.users == in_use and len(residency) == len(self.users)
        assert all((d in residency) == (d in self.users) for d in PAGES)
        assert self.evictor.pages(PageKind.ADAPTER) == sum(PAGES[d] for d in self.idle)
        slots = [r.slot for r in residents]
        assert len(set(slots)) == len(slots) and set(slots) <= set(range(self.num_slots))
        assert self.allocator.num_free == self.free
        self.allocator.check_owned({PageKind.KV: self.kv, PageKind.ADAPTER: [r.pages for r in residents]})
        counters = self.evictor.counters
        counted = counters.adapter_loads, counters.adapter_hits, counters.adapter_evictions
        assert counted == (self.loads, self.hits, self.evictions)

    def teardown(self):
        """At the end every page and every slot can be used again."""
        if not hasattr(self, "residency"):
            return
        for pages in self.kv:
            self.allocator.free(pages)
        for digest, users in self.users.items():
            for _ in range(users):
                self.residency.release(digest)
        self.evictor.make_room(self.capacity, PageKind.KV)
        assert self.allocator.num_free == self.capacity and not len(self.residency)
        count = min(self.num_slots, self.capacity)
        slots = {self.residency.acquire(f"new {n}", np.ones(7, np.int32), 1)[0].slot for n in range(count)}
        assert len(slots) == count


TestResidency = ResidencyMachine.TestCase


def test_least_recently_used_idle_adapter_is_evicted_first():
    residency = AdapterResidency(Evictor(PageAllocator(9), Lru()), num_slots=8)
    for digest in ("c", "d", "b"):  # 2 + 3 + 1 of 8 pages
        residency.acquire(digest, ranks_of(digest), PAGES[digest])
    for digest in ("d", "c", "b"):
        residency.release(digest)
    residency.acquire("d", ranks_of("d"), PAGES["d"])
    residency.release("d")  # used again: idle are now c, b, d
    residency.acquire("e", ranks_of("e"), PAGES["e"])  # wants 5 pages, 2 are free
    assert "c" not in residency and "b" not in residency and "d" in residency


def test_adapter_in_use_is_never_evicted():
    residency = AdapterResidency(Evictor(PageAllocator(9), Lru()), num_slots=2)
    resident, _ = residency.acquire("e", ranks_of("e"), 5)
    with pytest.raises(PoolError, match="8 pages requested, 3 of 8 free"):
        residency.acquire("f", ranks_of("f"), 8)
    residency.evictor.make_room(8, PageKind.KV)
    assert not residency.drop("e") and residency.residents == [resident]


def test_a_failed_acquire_takes_no_slot():
    residency = AdapterResidency(Evictor(PageAllocator(4), Lru()), num_slots=1)
    with pytest.raises(PoolError, match="8 pages requested, 3 of 3 free"):
        residency.acquire("f", ranks_of("f"), 8)
    assert residency.can_acquire("d")
    assert residency.acquire("d", ranks_of("d"), 3)[0].slot == 0


def test_slots_run_out_before_pages():
    residency = AdapterResidency(Evictor(PageAllocator(9), Lru()), num_slots=1)
    residency.acquire("a", ranks_of("a"), 1)
    assert not residency.can_acquire("b") and residency.can_acquire("a")
    with pytest.raises(PoolError, match="all 1 adapter slots are in use"):
        residency.acquire("b", ranks_of("b"), 1)
    residency.release("a")
    assert residency.can_acquire("b")
    resident, new = residency.acquire("b", ranks_of("b"), 1)
    assert new and resident.slot == 0 and "a" not in residency


def prefetched(num_pages=6, capacity=20):
    residency = AdapterResidency(Evictor(PageAllocator(capacity + 1), Lru()), num_slots=2)
    return residency, residency.prefetch("x", np.ones(7, np.int32), num_pages, position=1, protect_awaited=True)


def test_prefetched_adapter_is_usable_once_all_pages_landed():
    residency, resident = prefetched()
    uploads = [upload for budget in (2, 2, 0) for upload in residency.uploads(budget)]
    assert [(u.first, u.count) for u in uploads] == [(0, 2), (2, 2)]
    for upload in uploads:
        residency.landed(upload)
        with pytest.raises(PoolError, match="of 6 pages have landed"):
            residency.acquire("x", resident.ranks, 6)
    (last,) = residency.uploads(2)
    residency.landed(last)
    assert resident.has_landed and not residency.arriving and residency.num_unused == 1
    assert residency.acquire("x", resident.ranks, 6) == (resident, False)
    assert (
        residency.num_unused == 0
        and residency.evictor.counters.prefetch_hits == 1
        and residency.evictor.counters.adapter_hits == 0
    )
    residency.release("x")
    residency.acquire("x", resident.ranks, 6)
    assert residency.evictor.counters.adapter_hits == 1


def test_late_pages_of_an_evicted_adapter_do_not_count_for_its_next_upload():
    residency, resident = prefetched()
    (upload,) = residency.uploads(4)
    assert residency.drop("x") and not resident.present and residency.evictor.allocator.num_free == 20
    assert residency.evicted_before_use == {"x"} and residency.evictor.counters.prefetches_wasted == 1
    again = residency.prefetch("x", resident.ranks, 6, position=1, protect_awaited=True)
    residency.landed(upload)
    assert again.landed == 0 and not again.has_landed


def test_unwanted_adapter_in_flight_is_evicted():
    residency, resident = prefetched()
    other = residency.prefetch("y", np.ones(7, np.int32), 3, position=2, protect_awaited=True)
    while not resident.has_landed:
        residency.landed(residency.uploads(6)[0])
    residency.await_only({"y": 1}, {"x", "y"})
    assert other.awaited < resident.awaited
    residency.await_only({}, set())
    assert residency.residents == [resident] and resident.idle and not resident.awaited
    assert residency.evictor.counters.prefetches_wasted == 2 and not residency.evicted_before_use
