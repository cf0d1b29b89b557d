"""Prefix sharing in the scheduler, over a model of the pool that records what each token's keys were computed from."""

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from slora_jax.memory import CostAware, Immediate, Lru, PageKind, RestoreCosts
from slora_jax.scheduling import FinishReason, Status

SIZE = 4


@pytest.fixture(scope="session")
def shared(simulate):
    """A `Simulation` with a prefix cache. In its pool, the keys of a token are its adapter and all tokens up to it. The
    next token is one of two, a function of the last ones, so that many requests have common prefixes."""

    class Shared(simulate):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, **{"prefix_cache": True} | kwargs)
            self.keys: dict[tuple[int, int], tuple] = {}  # (page, offset) -> keys
            self.computed = 0

        def tokens(self, request):
            """Returns all tokens of a request, including those that the host has not read yet."""
            tokens = request.prompt + request.output
            while len(tokens) < request.num_tokens:
                tokens = [*tokens, self.following(tokens)]
            return tuple(tokens)

        @staticmethod
        def following(tokens):
            return (3 * tokens[-1] + len(tokens)) % 2

        def execute(self, plan):
            """Writes all keys of the step, then checks that each token reads the keys up to it, as a layer does."""
            for s in plan.sequences:
                tokens = self.tokens(s.request)
                for at in range(s.start, s.start + s.count):
                    place = s.request.pages[at // SIZE], at % SIZE
                    self.keys[place] = (s.request.digest, tokens[: at + 1])
            for s in plan.sequences:
                tokens = self.tokens(s.request)
                for at in range(s.start + s.count):
                    found = self.keys.get((s.request.pages[at // SIZE], at % SIZE))
                    assert found == (s.request.digest, tokens[: at + 1]), (s.request.number, at)
            self.computed += plan.num_tokens

        def serve(self, *args):
            """Runs one request to its end."""
            request = self.add(*args)
            self.run(most_steps=100)
            return request

    return Shared


def prompt_of(*lengths, seed=0):
    """Returns prompts of these lengths, each a prefix of the longest."""
    longest = np.random.default_rng(seed).integers(2, 100, max(lengths)).tolist()
    return [longest[:n] for n in lengths]


def first_chunk(plans, request):
    return next((s.start, s.count) for plan in plans for s in plan.sequences if s.request is request)


@pytest.mark.parametrize(("length", "cached"), [(17, 16), (16, 12), (15, 12), (5, 4), (4, 0)])
def test_prompt_is_cached_up_to_its_last_full_page_but_one_token_is_computed(shared, length, cached) -> None:
    sim = shared(num_pages=20, max_num_seqs=4, max_num_batched_tokens=64)
    prompt, longer = prompt_of(length, 30)
    sim.serve(longer, 1)
    request = sim.add(prompt, 1)
    assert first_chunk([sim.step()], request) == (cached, length - cached)
    assert request.metrics.cached_tokens == cached
    sim.run(most_steps=5)
    sim.assert_idle()


def test_requests_of_one_step_share_pages_computed_in_it(shared) -> None:
    sim = shared(num_pages=20, max_num_seqs=4, max_num_batched_tokens=64)
    first, second = (sim.add(p, 2) for p in prompt_of(18, 18))
    plan = sim.step()
    assert [(s.start, s.count) for s in plan.sequences] == [(0, 18), (16, 2)]
    assert plan.hits == [second]
    assert first.pages[:4] == second.pages[:4] and first.pages[4] != second.pages[4]
    assert (sim.allocator.count(PageKind.PREFIX), sim.allocator.count(PageKind.KV)) == (4, 2)
    sim.run(most_steps=5)
    sim.assert_idle()


def test_chunks_of_a_long_prompt_are_shared_as_they_are_computed(shared) -> None:
    sim = shared(num_pages=30, max_num_seqs=4, max_num_batched_tokens=12)
    sim.add(prompt_of(40)[0], 1)
    sim.step()
    later = sim.add(prompt_of(40)[0], 1)
    plans = [sim.step() for _ in range(4)]
    assert first_chunk(plans, later) == (36, 4)  # it waited for the budget until all but the last page was cached
    sim.run(most_steps=10)
    sim.assert_idle()


def test_preempted_request_hits_its_own_pages(shared, simulate) -> None:
    """The first pages of the second request are still cached when the first request has ended."""
    again = {}
    for make in (shared, simulate):
        sim = make(num_pages=8, max_num_seqs=2, max_num_batched_tokens=32)
        first, second = (sim.add(prompt_of(8, seed=i)[0], 17) for i in range(2))
        plans = sim.run(most_steps=60)
        assert (first.metrics.preemptions, second.metrics.preemptions, second.metrics.cached_tokens) == (0, 1, 0)
        starts = [s.start for plan in plans for s in plan.sequences if s.request is second]
        again[make] = next(b for a, b in itertools.pairwise(starts) if b != a + 1 and a)
        sim.assert_idle()
    assert again == {shared: 8, simulate: 0}


def test_next_turn_of_a_conversation_hits_prompt_and_answer(shared) -> None:
    sim = shared(num_pages=30, max_num_seqs=4, max_num_batched_tokens=64)
    first = sim.serve(prompt_of(10)[0], 9)
    turn = sim.add(first.prompt + first.output + [7, 7, 7], 2)
    # of 19 tokens, the last was sampled and never computed
    assert first_chunk([sim.step()], turn) == (16, 6)
    sim.run(most_steps=5)
    sim.assert_idle()


def test_equal_tokens_under_other_adapters_are_not_shared(shared) -> None:
    sim = shared(num_pages=60, max_num_seqs=4, max_num_batched_tokens=64)
    for adapter in (None, "a", "b"):
        assert sim.serve(prompt_of(20)[0], 3, adapter, 2).metrics.cached_tokens == 0
    for adapter in (None, "a", "b"):
        assert sim.serve(prompt_of(20)[0], 3, adapter, 2).metrics.cached_tokens == 16
    sim.assert_idle()


@pytest.mark.parametrize(("pages", "admitted"), [(8, True), (7, False)])
def test_idle_pages_that_are_hit_do_not_count_as_free(shared, pages, admitted) -> None:
    """Needs 5 idle pages that are hit, 2 new ones and one of another request: 8."""
    sim = shared(num_pages=pages, max_num_seqs=4, max_num_batched_tokens=64)
    sim.serve(prompt_of(20)[0], 2)
    sim.add([1], 3)
    sim.step()
    request = sim.add(prompt_of(28)[0], 1)
    sim.step()
    assert (request.status is Status.RUNNING) == admitted
    sim.run(most_steps=20)
    assert len(request.output) == 1
    sim.assert_idle()


def test_loading_an_adapter_does_not_evict_the_prefix_hit_with_it(shared) -> None:
    sim = shared(num_pages=12, max_num_seqs=4, max_num_batched_tokens=64)
    sim.serve(prompt_of(20)[0], 2, "a", 4)  # 5 pages stay, and the adapter
    sim.evictor.evict_one(PageKind.ADAPTER)
    sim.serve([1] * 9, 2)  # another prefix, newer: 2 pages
    request = sim.add(prompt_of(24)[0], 1, "a", 6)
    assert first_chunk([sim.step()], request) == (20, 4)
    sim.run(most_steps=5)
    sim.assert_idle()


def test_immediate_eviction_shares_among_running_requests_only(shared) -> None:
    sim = shared(num_pages=20, max_num_seqs=4, max_num_batched_tokens=64, eviction=Immediate())
    sim.add(prompt_of(18)[0], 4)
    sim.step()
    request = sim.add(prompt_of(18)[0], 9)
    assert first_chunk([sim.step()], request) == (16, 2)
    sim.run(most_steps=20)
    assert sim.allocator.num_free == 20
    assert sim.serve(prompt_of(18)[0], 2).metrics.cached_tokens == 0


def test_abandoned_plan_keeps_prefixes_of_earlier_steps_only(shared) -> None:
    sim = shared(num_pages=30, max_num_seqs=4, max_num_batched_tokens=12)
    sim.add(prompt_of(30)[0], 1)
    sim.step()  # 12 tokens are computed
    sim.add(prompt_of(30)[0], 1)
    plan = sim.scheduler.schedule(1.0)
    assert len(plan.registered) == 1
    sim.scheduler.abandon(plan, lambda request: sim.core.finish(request, FinishReason.ERROR))
    for request in list(sim.scheduler.waiting):
        sim.core.finish(request, FinishReason.CANCELLED)
    sim.scheduler.check()
    assert sim.allocator.count(PageKind.PREFIX) == 3
    assert sim.serve(prompt_of(30)[0], 2).metrics.cached_tokens == 12


def test_abandoned_recomputation_registers_no_prefix(shared) -> None:
    sim = shared(num_pages=30, max_num_seqs=2, max_num_batched_tokens=8)
    request = sim.add([5] * 4, 30)
    while len(request.output) < 20:
        sim.step()
    sim.scheduler._preempt(request)
    sim.prefixes.drop(None)
    while request.status is Status.WAITING:
        sim.step()
    assert request.num_computed == 8 and request.num_shared == 2
    plan = sim.scheduler.schedule(99.0)
    assert (plan.sequences[0].start, plan.sequences[0].count) == (8, 8)
    sim.scheduler.abandon(plan, lambda request: sim.core.finish(request, FinishReason.ERROR))
    sim.scheduler.check()
    assert sim.allocator.count(PageKind.PREFIX) == 2


def test_abandoned_plan_with_hits_leaves_nothing(shared) -> None:
    sim = shared(num_pages=30, max_num_seqs=4, max_num_batched_tokens=64)
    for n in (10, 18, 26, 9):
        sim.add(prompt_of(n)[0], 5)
    plan = sim.scheduler.schedule(0.0)
    assert len(plan.hits) == 3 and len(plan.registered) == 3
    sim.scheduler.abandon(plan, lambda request: sim.core.finish(request, FinishReason.ERROR))
    sim.scheduler.check()
    assert sim.allocator.num_free == 30


# Prefixes and adapters compete


COSTS = {"prefix": RestoreCosts(0.0, 0.1, 3.0), "adapter": RestoreCosts(9.0, 3.0, 0.1)}


@pytest.mark.parametrize("expensive", sorted(COSTS))
def test_cost_aware_keeps_expensive_popular_entries(shared, expensive) -> None:
    """A popular prefix among adapters used once, and a popular adapter among prompts used once. LRU would evict
    both."""
    sim = shared(num_pages=20, max_num_seqs=2, max_num_batched_tokens=64, eviction=CostAware(COSTS[expensive]))
    for _ in range(4):
        sim.serve(prompt_of(17)[0], 1, None if expensive == "prefix" else "popular", 4)
    loads = sim.counters.adapter_loads
    for i in range(12):
        if expensive == "prefix":
            sim.serve([1], 1, f"once-{i}", 4)
        else:
            sim.serve(prompt_of(17, seed=1 + i)[0], 1)
    if expensive == "prefix":
        assert sim.counters.adapter_evictions >= 8 and sim.counters.prefix_evictions == 0
        assert sim.serve(prompt_of(17)[0], 1).metrics.cached_tokens == 16
    else:
        assert sim.counters.prefix_evictions >= 30 and sim.counters.adapter_evictions == 0
        sim.serve([1], 1, "popular", 4)
        assert sim.counters.adapter_loads == loads
    sim.assert_idle()


def test_lru_treats_prefixes_and_adapters_alike(shared) -> None:
    sim = shared(num_pages=12, max_num_seqs=2, max_num_batched_tokens=64, eviction=Lru())
    sim.serve(prompt_of(17)[0], 1)
    sim.serve([1], 1, "a", 4)
    sim.serve([1], 1, "b", 6)  # of 12 pages, the 4 of the prefix are idle for longest
    assert "a" in sim.residency and sim.counters.prefix_evictions >= 2
    sim.serve(prompt_of(25, seed=3)[0], 1)
    assert "a" not in sim.residency
    sim.assert_idle()


# Reserve-all-output admission


def test_reservation_counts_shared_pages_once(shared) -> None:
    """8 pages of instructions for all, 1 page for each and one of rounding: 6 requests run in 20 pages. It would be 2
    if each counted the instructions."""
    sim = shared(num_pages=20, max_num_seqs=8, max_num_batched_tokens=64, admission="reserve")
    instructions = prompt_of(32)[0]
    sim.serve([*instructions, 1], 1)
    for i in range(8):
        sim.add([*instructions, 100 + i], 4)
    sim.step()
    assert len(sim.scheduler.running) == 6
    sim.run(most_steps=40)
    assert sim.counters.preemptions == 0
    sim.assert_idle()


@pytest.mark.parametrize("delay", [0, 1, 2])
@pytest.mark.parametrize(("found", "idle"), [(5, 0), (8, 3)])
def test_reservation_counts_a_prefix_whose_first_holder_ends(shared, found, idle, delay) -> None:
    """The first holder of 5 pages ends soon. A second request hits these, and idle ones below them, and keeps all to
    the end, beside a third: the hit pages, and 4 for each of the two. In fewer pages they must not run together."""
    together, needed = {}, found + 4 + 4
    for pages in range(needed - 3, needed + 5):
        sim = shared(pages, max_num_seqs=8, max_num_batched_tokens=64, admission="reserve")
        sim.serve(prompt_of(33)[0][: 4 * found + 1], 1)
        other, _ = sim.add([1, 2, 3, 4], 13), sim.add(prompt_of(33)[0][:21], 2)
        for _ in range(delay):
            sim.step()
        heir = sim.add(prompt_of(33)[0][: 4 * found + 1], 13)
        assert sim.evictor.pages(PageKind.PREFIX) == (idle if delay else found)
        sim.step()
        together[pages] = heir.status is Status.RUNNING and other.status is Status.RUNNING
        sim.run(most_steps=60)
        assert sim.counters.preemptions == 0
        sim.assert_idle()
    assert [together[n] for n in (needed - 3, needed - 2, needed - 1, needed + 4)] == [False, False, False, True]


def test_reservation_does_not_give_shared_pages_to_a_third_request(shared) -> None:
    """Two share 8 pages and take 4 each; the third needs 4: 20, and rounding."""
    together = {}
    for pages in range(15, 25):
        sim = shared(pages, max_num_seqs=8, max_num_batched_tokens=64, admission="reserve")
        sim.serve(prompt_of(33)[0], 1)
        for _ in range(2):
            sim.add(prompt_of(33)[0], 13)
        sim.step()
        sim.step()
        third = sim.add([1, 2, 3, 4], 13)
        sim.step()
        together[pages] = len(sim.scheduler.running) == 3
        sim.run(most_steps=80)
        assert sim.counters.preemptions == 0 and len(third.output) == 13
        sim.assert_idle()
    assert not together[17] and together[24]


ADAPTERS = {None: 0, "a": 2, "b": 5}
beginnings = st.sampled_from([0, 3, 4, 8, 13])
requests = st.tuples(beginnings, st.integers(0, 2), st.integers(1, 9), st.integers(1, 20), st.sampled_from([*ADAPTERS]))


def tokens_of(beginning, kind, rest):
    """Returns a prompt: a prefix of one of three texts, then a short end that other prompts may share."""
    return [10 + kind] * beginning + [i % 2 for i in range(rest)]


def pages_alone(request):
    beginning, _, rest, new, adapter = request
    return -(-(beginning + rest + new - 1) // SIZE) + ADAPTERS[adapter]


@given(st.lists(requests, max_size=16), st.integers(0, 20), st.integers(1, 8), st.lists(st.integers(0, 4), min_size=16))
def test_reserve_never_preempts_with_shared_prefixes(shared, sizes, spare, max_num_seqs, gaps) -> None:
    """Prompts take one step and all requests generate their maximum: pages run out if admission counts too few."""
    pages = max(map(pages_alone, sizes), default=1) + spare
    sim = shared(pages, max_num_seqs, max_num_batched_tokens=1000, admission="reserve")
    for (beginning, kind, rest, new, adapter), gap in zip(sizes, gaps, strict=False):
        sim.add(tokens_of(beginning, kind, rest), new, adapter, ADAPTERS[adapter])
        for _ in range(gap):
            sim.step()
    sim.run(most_steps=1000)
    sim.assert_idle()
    assert sim.counters.preemptions == 0
    assert all(len(r.output) == r.max_new for r in sim.requests)


@given(
    sizes=st.lists(requests, min_size=1, max_size=16),
    spare=st.integers(0, 16),
    max_num_seqs=st.integers(1, 6),
    budget=st.integers(0, 20),
    gaps=st.lists(st.integers(0, 5), min_size=16, max_size=16),
    events=st.dictionaries(st.integers(0, 80), st.tuples(st.sampled_from(["cancel", "drop"]), st.integers(0, 15))),
    stops=st.dictionaries(st.integers(0, 15), st.integers(1, 10)),
    policy=st.sampled_from(["lru", "cost_aware", "immediate"]),
    admission=st.sampled_from(["optimistic", "reserve"]),
    split=st.booleans(),
)
def test_random_traffic_reads_only_keys_computed_for_it_and_ends(
    shared, sizes, spare, max_num_seqs, budget, gaps, events, stops, policy, admission, split
) -> None:
    """`dispatch` checks the context of every token, `step` the owners of all pages."""
    eviction = {"lru": Lru, "immediate": Immediate, "cost_aware": lambda: CostAware(RestoreCosts(1.0, 0.1, 1.0))}
    pages = max(map(pages_alone, sizes)) + spare
    sim = shared(
        pages + 5 * split, max_num_seqs, max_num_seqs + budget, 3, admission=admission, eviction=eviction[policy](),
        adapter_pages=5 if split else None,
    )  # fmt: skip
    sim.stop_early = {number: stop for number, stop in stops.items() if number < len(sizes) and stop < sizes[number][3]}
    waiting, pause, steps = list(zip(sizes, gaps, strict=False)), 0, 0
    while waiting or sim.scheduler.has_work():
        while waiting and pause <= 0:
            (beginning, kind, rest, new, adapter), pause = waiting.pop(0)
            sim.add(tokens_of(beginning, kind, rest), new, adapter, ADAPTERS[adapter])
        pause -= 1
        event, number = events.get(steps, (None, 0))
        if event == "cancel" and number < len(sim.requests):
            sim.core.finish(sim.requests[number], FinishReason.CANCELLED)
        elif event == "drop":
            sim.prefixes.drop([None, "a", "b"][number % 3])
        sim.step()
        steps += 1
        assert steps < 5000, "the scheduler makes no progress"
    sim.step()
    for request in sim.requests:
        if request.finish_reason in (FinishReason.STOP, FinishReason.LENGTH):
            assert len(request.output) == sim.stop_early.get(request.number, request.max_new)
            tokens = list(request.prompt)
            read = request.output[: -1 if request.finish_reason is FinishReason.STOP else None]
            for _ in read:
                tokens.append(sim.following(tokens))
            assert tokens == request.prompt + read
        else:
            assert request.finish_reason is FinishReason.CANCELLED
    sim.assert_idle()
    for digest in (None, "a", "b"):
        sim.prefixes.drop(digest)
    assert sim.allocator.count(PageKind.PREFIX) == 0
