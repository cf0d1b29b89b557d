"""Requests with a common prefix share its pages: the same tokens from fewer computed rows."""

from dataclasses import replace

import numpy as np
import pytest
from drain import drain

from slora_jax import Engine, SamplingParams
from slora_jax.adapters import random_adapter
from slora_jax.memory import PageKind
from slora_jax.models import init_random

PAGE = 8
INSTRUCTIONS = np.random.default_rng(1).integers(2, 300, 40).tolist()
ANSWER = SamplingParams(max_tokens=12, ignore_eos=True)


@pytest.fixture(scope="module")
def plain(tiny):
    """An engine without a prefix cache."""
    with tiny.engine(prefix_cache=False) as engine:
        yield engine
        assert engine.prefixes is None
        stats = engine.stats()
        assert (stats.pages.prefix, stats.prefix_hit_tokens, stats.pages.prefix_idle) == (0, 0, 0)


@pytest.fixture
def both(engine, plain, tiny):
    """The engines with and without a prefix cache, with the same adapters."""
    for seed, name in enumerate("abc"):
        for each in (engine, plain):
            each.load_adapter(name, random_adapter(tiny.geometry, 8, seed=seed))
    yield engine, plain
    for info in plain.adapters():
        plain.unload_adapter(info.name)


def tokens(outputs):
    return [output.token_ids for output in outputs]


def questions(rng, count):
    """Prompts that begin with a part of the instructions."""
    lengths = rng.integers((0, 1), (41, 9), (count, 2)).tolist()
    return [INSTRUCTIONS[:shared] + rng.integers(2, 300, own).tolist() for shared, own in lengths]


def test_shared_prefixes_give_the_same_tokens_and_each_hit_saves_a_row(both, rng) -> None:
    prompts = questions(rng, 24)
    names = rng.choice(["a", "b", None], 24).tolist()
    computed, results = [], []
    for each in both:
        before = each.stats()
        results.append(each.generate(prompts, ANSWER, names))
        computed.append(each.stats().tokens_computed - before.tokens_computed)
    assert tokens(results[0]) == tokens(results[1])
    cached = [output.metrics.cached_tokens for output in results[0]]
    assert computed[1] - computed[0] == sum(cached) > 8 * PAGE
    assert all(n % PAGE == 0 and n < len(p) for n, p in zip(cached, prompts, strict=True))
    assert not any(output.metrics.cached_tokens for output in results[1])


def test_requests_of_one_step_share_their_prefix(both) -> None:
    """All four are admitted in one step; the first computes the page that the others read."""
    prompts = [[*INSTRUCTIONS[:8], n] for n in (5, 6, 7, 8)]
    with_cache, without = (each.generate(prompts, ANSWER, "a") for each in both)
    assert tokens(with_cache) == tokens(without)
    assert [output.metrics.cached_tokens for output in with_cache] == [0, 8, 8, 8]


def test_equal_tokens_under_different_adapters_are_not_shared(both) -> None:
    engine, plain = both
    names = ["a", None, "b", "c"]
    for _ in range(2):  # the second time, each hits its own prefix
        outputs = [engine.generate([INSTRUCTIONS], ANSWER, name)[0] for name in names]
        assert tokens(outputs) == tokens([plain.generate([INSTRUCTIONS], ANSWER, name)[0] for name in names])
    assert {output.metrics.cached_tokens for output in outputs} == {len(INSTRUCTIONS) - PAGE}
    assert len(set(map(tuple, tokens(outputs)))) == 4


@pytest.mark.parametrize("steps", [0, 2, 9])
def test_new_weights_under_a_name_never_hit_prefixes_of_the_old_ones(both, tiny, steps) -> None:
    """Reloaded while a request with the old weights is waiting, in prefill, decoding."""
    engine, plain = both
    old, new = (random_adapter(tiny.geometry, 8, seed=seed) for seed in (50, 51))
    expected = {}
    for adapter in (old, new):
        plain.load_adapter("x", adapter)
        expected[id(adapter)] = plain.generate([INSTRUCTIONS], ANSWER, "x")[0].token_ids
    assert expected[id(old)] != expected[id(new)]
    engine.load_adapter("x", old)
    engine.generate([INSTRUCTIONS], ANSWER, "x")
    before = engine.add_request(INSTRUCTIONS, ANSWER, "x")
    for _ in range(steps):
        engine.step()
    engine.load_adapter("x", new)
    after = engine.add_request(INSTRUCTIONS, ANSWER, "x")
    outputs = drain(engine)
    assert outputs[before].token_ids == expected[id(old)] and outputs[after].token_ids == expected[id(new)]
    assert outputs[after].metrics.cached_tokens == 0
    held = engine.stats().pages.prefix
    engine.unload_adapter("x")
    assert engine.stats().pages.prefix < held, "its prefixes were dropped with it"
    assert engine.allocator.num_free == engine.allocator.capacity


def test_preempted_requests_resume_from_their_cached_pages(both, squeeze) -> None:
    engine, plain = both
    prompts, params = [[*INSTRUCTIONS[:17], n] for n in range(2, 6)], SamplingParams(max_tokens=40, ignore_eos=True)
    expected = tokens(plain.generate(prompts, params, ["a", "a", "b", None]))
    before = engine.stats()
    with squeeze(engine, 26):
        outputs = engine.generate(prompts, params, ["a", "a", "b", None])
        after = engine.stats()
        engine.residency.evictor.make_room(26, PageKind.KV)
    assert tokens(outputs) == expected
    assert after.preemptions > before.preemptions
    first = sum(output.metrics.cached_tokens for output in outputs)
    assert after.prefix_hit_tokens - before.prefix_hit_tokens > first, "also hits on readmission"


@pytest.mark.parametrize("steps", [0, 1, 2, 6])
def test_request_that_computed_a_shared_prefix_can_be_cancelled_at_any_step(both, steps) -> None:
    engine, plain = both
    expected = tokens(plain.generate([INSTRUCTIONS, [*INSTRUCTIONS[:20], 5]], ANSWER, "a"))
    donor = engine.add_request(INSTRUCTIONS, ANSWER, "a")
    engine.step()
    others = [engine.add_request(prompt, ANSWER, "a") for prompt in (INSTRUCTIONS, [*INSTRUCTIONS[:20], 5])]
    for _ in range(steps):
        engine.step()
    engine.cancel(donor)
    engine.check()
    outputs = drain(engine)
    assert [outputs[request].token_ids for request in others] == expected


@pytest.mark.parametrize("call", range(4))
def test_prefixes_of_a_failed_step_are_not_hit(both, monkeypatch, call) -> None:
    engine, plain = both
    prompts = [[*INSTRUCTIONS, 5], [*INSTRUCTIONS[:25], 6], INSTRUCTIONS[:18]]
    expected = tokens(plain.generate(prompts, ANSWER, "a"))
    dispatch, calls = engine.executor.dispatch, iter(range(100))

    def failing(plan):
        if next(calls) == call:
            raise RuntimeError("no memory")
        return dispatch(plan)

    with monkeypatch.context() as patch, pytest.raises(RuntimeError, match="no memory"):
        patch.setattr(engine.executor, "dispatch", failing)
        engine.generate(prompts, ANSWER, "a")
    engine.check()
    assert engine.stats().pages.kv == 0
    assert tokens(engine.generate(prompts, ANSWER, "a")) == expected


def test_hits_are_counted_and_compile_nothing(both, compilations) -> None:
    engine, _ = both
    before = engine.stats()
    engine.generate([INSTRUCTIONS] * 6, ANSWER, "a")
    stats = engine.stats()
    assert not compilations
    assert stats.prompt_tokens - before.prompt_tokens == 6 * len(INSTRUCTIONS)
    assert stats.prefix_hit_tokens - before.prefix_hit_tokens >= 5 * 8
    assert stats.pages.kv == 0 and stats.pages.prefix == stats.pages.prefix_idle > 0
    engine.residency.evictor.make_room(engine.allocator.capacity, PageKind.KV)
    assert engine.stats().prefix_evictions - stats.prefix_evictions == stats.pages.prefix


def test_sliding_window_attends_over_shared_pages(tiny) -> None:
    """The window of 11 tokens ends within pages."""
    config = replace(tiny.config, sliding_window=11)
    graphdef, _ = init_random(config, "float32", seed=0)
    settings = tiny.settings(compile_ahead=False)
    with Engine(config, graphdef, tiny.params, settings) as engine:
        prompts = [[*INSTRUCTIONS[:n], 5] for n in (40, 33, 24, 11)]
        alone = []
        for prompt in prompts:
            alone += engine.generate([prompt], ANSWER)
            engine.prefixes.drop(None)
        assert not any(output.metrics.cached_tokens for output in alone)
        for _ in range(2):
            together = engine.generate(prompts, ANSWER)
            assert tokens(together) == tokens(alone)
        assert [output.metrics.cached_tokens for output in together] == [40, 32, 24, 8]
        engine.check()
