"""Workloads: rates, variation, skew and lengths; the synthetic requests are those of the published runs."""

import inspect
import itertools

import numpy as np
import pytest

from experiments.paper import SETTINGS
from experiments.paper.exclusions import exclusion
from experiments.workloads import (
    BASE,
    INDEPENDENT,
    WORKLOADS,
    Workload,
    arena_like,
    conversations,
    shared_prefix,
    synthetic,
    synthetic_text,
)
from slora_jax import ConfigError

SEED = 42
FROM_FILES = ("azure", "real_trace", "replay")
AT_ONCE = ("batch", "bursts", "shifting", "chats")  # whose number of requests is an argument
MADE_UP = [name for name in WORKLOADS if name not in (*FROM_FILES, *AT_ONCE)]
COMMON = {"num_adapters": 20, "ranks": (8, 16), "rate": 4.0, "duration": 60.0}


def paper_load(num_adapters: int, rate: float, duration: float, **fields) -> Workload:
    return synthetic(num_adapters=num_adapters, ranks=(64, 32), rate=rate, duration=duration, **fields)


def test_the_first_requests_are_those_of_the_papers_generator() -> None:
    """Transcribed: the legacy generator's draws in the order of its code, one call after the other."""
    np.random.seed(SEED)
    adapters = (np.random.power(0.3, 600) * 200).astype(int)
    prompts = np.random.randint(8, 512, 600)
    outputs = np.random.randint(8, 1024, 600)
    intervals = np.random.gamma(1 / 16, 16 / 2, 600)
    made = paper_load(200, 2, 300, alpha=0.3, cv=4, output_range=(8, 1024))
    assert made.adapter.tolist() == adapters.tolist()
    assert made.prompt_tokens.tolist() == prompts.tolist()
    assert made.output_tokens.tolist() == outputs.tolist()
    np.testing.assert_allclose(made.arrival, list(itertools.accumulate(intervals)))
    assert made.ranks[:3] == (64, 32, 64) and len(made.ranks) == 200


def test_published_runs_end_after_their_last_arrival_and_idle_ones_soon_after(paper_rows) -> None:
    """The order of draws is right: with another one, some arrival would come after the run's published end."""
    drains = {}
    for row in paper_rows:
        if row.workload == "synthetic" and row.system != "pets":
            workload = synthetic(
                num_adapters=row.num_adapters,
                ranks=SETTINGS[row.setting].ranks,
                rate=row.rate,
                duration=row.duration,
                alpha=row.alpha,
                cv=row.cv,
                input_range=row.input_range,
                output_range=row.output_range,
            )
            drain = row.total_time - workload.arrival[-1]
            assert drain > 0, row
            if exclusion(row) is None:
                key = (row.rate, row.cv, row.duration)
                drains[key] = min(drains.get(key, np.inf), drain)
    assert len(drains) > 20
    light = [drain for (rate, _, duration), drain in drains.items() if rate <= 2 and duration == 300]
    assert len(light) >= 7 and max(light) < 25, light


@pytest.mark.parametrize("cv", [1.0, 2.0, 4.0])
def test_arrivals_have_the_rate_and_variation_asked_for(cv) -> None:
    workload = paper_load(10, 50.0, 2000.0, cv=cv, seed=7)
    gaps = np.diff(workload.arrival)
    assert gaps.mean() == pytest.approx(1 / 50, rel=0.05)
    assert gaps.std() / gaps.mean() == pytest.approx(cv, rel=0.05)


def test_alpha_1_is_even_and_less_prefers_low_adapter_numbers() -> None:
    even = paper_load(50, 100.0, 1000.0, alpha=1.0)
    counts = np.bincount(even.adapter, minlength=50)
    assert counts.min() > 0.85 * counts.mean() and counts.max() < 1.15 * counts.mean()
    skewed = paper_load(50, 100.0, 1000.0, alpha=0.1)
    share = np.mean(skewed.adapter == 0)
    assert share == pytest.approx((1 / 50) ** 0.1, abs=0.01)  # P(u^(1/alpha) < 1/n)


def test_lengths_are_uniform_in_their_ranges() -> None:
    workload = paper_load(3, 100.0, 1000.0, input_range=(8, 512), output_range=(8, 1024))
    for lengths, high in ((workload.prompt_tokens, 512), (workload.output_tokens, 1024)):
        assert lengths.min() == 8 and lengths.max() == high - 1
        assert lengths.mean() == pytest.approx((8 + high - 1) / 2, rel=0.01)


def test_no_adapters_means_the_base_model() -> None:
    workload = paper_load(0, 2.0, 60.0)
    assert set(workload.adapter.tolist()) == {BASE} and workload.ranks == ()
    assert workload.prompt_tokens.tolist() == paper_load(1, 2.0, 60.0).prompt_tokens.tolist()


def test_the_arena_stand_in_has_the_published_means_and_span() -> None:
    workload = arena_like(ranks=(64, 32, 16, 8), rate=10.0, duration=300.0)
    assert len(workload) == 3000 and len(workload.ranks) == 26
    assert workload.prompt_tokens.mean() == pytest.approx(85, rel=0.05)
    assert workload.output_tokens.mean() == pytest.approx(165, rel=0.05)
    for lengths in (workload.prompt_tokens, workload.output_tokens):
        assert lengths.min() >= 1 and lengths.max() < 512
    assert (workload.arrival[0], workload.arrival[-1]) == (0.0, 300.0)
    popular = np.bincount(workload.adapter, minlength=26)
    assert popular[0] > 3 * popular[-1] > 0


# The paper's text


@pytest.mark.parametrize(("alpha", "cv"), [(0.0, 1.0), (0.6, 4.0), (1.0, 2.0), (2.0, 0.5)])
def test_in_the_text_each_adapter_has_its_rate_and_variation(alpha, cv) -> None:
    """Against the formulas: counts within 5 standard deviations of a renewal process (variance cv^2 of the mean)."""
    adapters, rate, duration = 6, 60.0, 4000.0
    work = synthetic_text(
        num_adapters=adapters, ranks=(8,), rate=rate, duration=duration, alpha=alpha, cv=cv, seed=SEED
    )
    weights = [(i + 1) ** -alpha for i in range(adapters)]
    assert len(work) == pytest.approx(rate * duration, abs=5 * cv * np.sqrt(rate * duration))
    assert np.all(np.diff(work.arrival) >= 0) and work.arrival[0] >= 0 and work.arrival[-1] < duration
    for i, weight in enumerate(weights):
        own = work.arrival[work.adapter == i]
        mean = rate * weight / sum(weights) * duration
        assert len(own) == pytest.approx(mean, abs=5 * cv * np.sqrt(mean)), (i, alpha)
        gaps = np.diff(own)
        assert gaps.std() / gaps.mean() == pytest.approx(cv, rel=0.1), (i, alpha)


@pytest.mark.parametrize("cv", [0.3, 1.0, 4.0])
def test_in_the_text_the_rate_is_the_same_from_the_start(cv) -> None:
    """A thousand adapters with two requests each: if all processes started at 0, cv = 4 would put most requests
    there."""
    work = synthetic_text(num_adapters=1000, ranks=(8,), rate=20.0, duration=100.0, alpha=0.0, cv=cv, seed=SEED)
    counts = np.histogram(work.arrival, bins=5, range=(0, 100))[0]
    assert counts == pytest.approx(np.full(5, 400), abs=5 * max(1, cv) * np.sqrt(400)), counts


def test_in_the_text_all_adapters_together_vary_less_than_each() -> None:
    variation = []
    for adapters in (1, 10, 100):
        work = synthetic_text(
            num_adapters=adapters, ranks=(8,), rate=50.0, duration=2000.0, alpha=0.0, cv=4.0, seed=SEED
        )
        gaps = np.diff(work.arrival)
        variation.append(gaps.std() / gaps.mean())
    assert variation == pytest.approx([4.0, 3.1, 2.3], rel=0.1)


def test_in_the_text_lengths_are_uniform_with_both_ends() -> None:
    work = synthetic_text(**COMMON | {"rate": 1000.0}, input_range=(8, 10), output_range=(5, 5))
    counts = np.bincount(work.prompt_tokens)
    assert len(counts) == 11 and counts[8:] == pytest.approx(np.full(3, len(work) / 3), rel=0.05)
    assert set(work.output_tokens.tolist()) == {5}


# Shared beginnings


def test_prompts_begin_with_instructions_of_their_adapter() -> None:
    work = shared_prefix(**COMMON, prefix_tokens=100, texts=3, input_range=(4, 20), exponent=1.0)
    assert len(work) == 240 and set(work.prefix_tokens.tolist()) == {100}
    assert (work.prefix_text // 3).tolist() == work.adapter.tolist()  # no text of two adapters
    assert len(set(work.prefix_text[work.adapter == 0].tolist())) == 3
    own = work.prompt_tokens - work.prefix_tokens
    assert own.min() == 4 and own.max() == 19


def test_a_turn_has_the_prompt_of_the_turn_before_and_a_message_and_follows_its_answer() -> None:
    work = conversations(**COMMON, turns=5, think_seconds=7.0, input_range=(4, 20))
    assert len(work) == 5 * 48 and work.prefix_tokens.tolist() == work.prompt_tokens.tolist()
    prompts, after = work.prompt_tokens.reshape(48, 5), work.after.reshape(48, 5)
    messages = np.diff(prompts, axis=1, prepend=0)
    assert messages.min() == 4 and messages.max() == 19
    assert set(after[:, 0].tolist()) == {INDEPENDENT} and after[:, 1:].tolist() == (
        np.arange(240).reshape(48, 5)[:, :4].tolist()
    )
    arrival = work.arrival.reshape(48, 5)
    assert set(arrival[:, 1:].ravel().tolist()) == {7.0}
    assert arrival[-1, 0] == pytest.approx(60, rel=0.5)
    for column in (work.prefix_text, work.adapter):
        rows = column.reshape(48, 5)
        assert np.all(rows == rows[:, :1])
    assert len(set(work.prefix_text.tolist())) == 48


# All of them


def test_all_generators_take_the_same_arguments_by_name_only() -> None:
    for name, make in WORKLOADS.items():
        parameters = inspect.signature(make, eval_str=True).parameters
        assert list(parameters)[:5] == ["num_adapters", "ranks", "rate", "duration", "seed"], name
        assert all(p.kind is p.KEYWORD_ONLY and p.annotation is not p.empty for p in parameters.values()), name


@pytest.mark.parametrize("name", MADE_UP)
def test_a_seed_gives_its_own_requests_and_always_the_same(name) -> None:
    first, second = (WORKLOADS[name](**COMMON, seed=3) for _ in range(2))
    other = WORKLOADS[name](**COMMON, seed=4)
    for field in ("arrival", "adapter", "prompt_tokens", "output_tokens"):
        assert np.array_equal(getattr(first, field), getattr(second, field))
        assert not np.array_equal(getattr(first, field), getattr(other, field))
    assert first.ranks == (8, 16) * 10
    assert abs(len(first) - 240) < 60


@pytest.mark.parametrize("name", AT_ONCE)
def test_a_seed_decides_which_adapters_get_how_many_requests_at_once(name) -> None:
    first, second, other = (WORKLOADS[name](**COMMON, seed=seed, requests=40) for seed in (3, 3, 4))
    assert first.adapter.tolist() == second.adapter.tolist() != other.adapter.tolist()
    assert len(first) == (60 if name == "shifting" else 40)


@pytest.mark.parametrize("name", [*MADE_UP, "batch", "chats"])
def test_no_adapters_means_the_base_model_everywhere(name) -> None:
    work = WORKLOADS[name](**COMMON | {"num_adapters": 0, "ranks": ()})
    assert set(work.adapter.tolist()) == {BASE} and work.ranks == ()


@pytest.mark.parametrize("name", [*MADE_UP, *AT_ONCE])
@pytest.mark.parametrize(
    ("field", "value"),
    [("num_adapters", -1), ("ranks", ()), ("rate", 0.0), ("rate", float("nan")), ("duration", float("inf"))],
)
def test_an_argument_out_of_range_is_refused_by_name(name, field, value) -> None:
    with pytest.raises(ConfigError, match=f"{'batch' if name == 'shifting' else name}: {field}="):
        WORKLOADS[name](**COMMON | {field: value})


@pytest.mark.parametrize(
    ("name", "fields"),
    [
        ("synthetic", {"alpha": 0.0}),
        ("synthetic", {"output_range": (5, 5)}),
        ("synthetic_text", {"alpha": -0.1}),
        ("synthetic_text", {"input_range": (6, 5)}),
        ("synthetic_text", {"input_range": (0, 5)}),
        ("shared_prefix", {"prefix_tokens": 0}),
        ("conversations", {"think_seconds": -1.0}),
        ("conversations", {"turns": 0}),
        ("batch", {"used": 21}),
        ("bursts", {"burst": 0}),
        ("chats", {"message_tokens": 0}),
    ],
)
def test_a_field_of_its_own_out_of_range_is_refused_by_name(name, fields) -> None:
    with pytest.raises(ConfigError, match=f"{name}: {next(iter(fields))}="):
        WORKLOADS[name](**COMMON, **fields)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"adapter": [0]}, "arrays of"),
        ({"arrival": [1.0, 0.0]}, "must not decrease"),
        ({"arrival": [-1.0, 0.0]}, "must be at least 0"),
        ({"adapter": [0, 1]}, "below 1"),
        ({"after": [INDEPENDENT]}, "arrays of"),
        ({"after": [INDEPENDENT, 1]}, "an earlier request"),
        ({"after": [INDEPENDENT, -2]}, "an earlier request"),
        ({"prefix_text": [0, 0]}, "both be given"),
        ({"prefix_text": [0, 0], "prefix_tokens": [0, 2]}, "0 to prompt_tokens"),
        ({"prefix_text": [0, -1], "prefix_tokens": [0, 1]}, "prefix_text: must be at least 0"),
    ],
)
def test_an_impossible_workload_is_refused(changes, message) -> None:
    arrays = {"arrival": [0.0, 1.0], "adapter": [0, 0], "prompt_tokens": [1, 1], "output_tokens": [1, 1]} | changes
    with pytest.raises(ValueError, match=message):
        Workload(**{name: np.array(values) for name, values in arrays.items()}, ranks=(8,))
