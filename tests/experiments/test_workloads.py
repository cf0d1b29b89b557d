"""Request lists: rates, variation, skew, lengths, and that the synthetic ones are those of the published runs."""

import itertools

import numpy as np
import pytest

from experiments.paper import SETTINGS
from experiments.paper.exclusions import exclusion
from experiments.workloads import BASE, Workload, arena_like, azure, synthetic

SEED = 42


def test_the_first_requests_are_those_of_the_papers_generator() -> None:
    """Transcribed: the legacy generator's draws in the order of its code, one call after the other."""
    np.random.seed(SEED)
    adapters = (np.random.power(0.3, 600) * 200).astype(int)
    prompts = np.random.randint(8, 512, 600)
    outputs = np.random.randint(8, 1024, 600)
    intervals = np.random.gamma(1 / 16, 16 / 2, 600)
    made = synthetic(200, 2, 300, (64, 32), alpha=0.3, cv=4, output_range=(8, 1024))
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
                row.num_adapters,
                row.rate,
                row.duration,
                SETTINGS[row.setting].ranks,
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
    workload = synthetic(10, 50.0, 2000.0, (8,), cv=cv, seed=7)
    gaps = np.diff(workload.arrival)
    assert gaps.mean() == pytest.approx(1 / 50, rel=0.05)
    assert gaps.std() / gaps.mean() == pytest.approx(cv, rel=0.05)


def test_alpha_1_is_even_and_less_prefers_low_adapter_numbers() -> None:
    even = synthetic(50, 100.0, 1000.0, (8,), alpha=1.0)
    counts = np.bincount(even.adapter, minlength=50)
    assert counts.min() > 0.85 * counts.mean() and counts.max() < 1.15 * counts.mean()
    skewed = synthetic(50, 100.0, 1000.0, (8,), alpha=0.1)
    share = np.mean(skewed.adapter == 0)
    assert share == pytest.approx((1 / 50) ** 0.1, abs=0.01)  # P(u^(1/alpha) < 1/n)


def test_lengths_are_uniform_in_their_ranges() -> None:
    workload = synthetic(3, 100.0, 1000.0, (8,), input_range=(8, 512), output_range=(8, 1024))
    for lengths, high in ((workload.prompt_tokens, 512), (workload.output_tokens, 1024)):
        assert lengths.min() == 8 and lengths.max() == high - 1
        assert lengths.mean() == pytest.approx((8 + high - 1) / 2, rel=0.01)


def test_no_adapters_means_the_base_model() -> None:
    workload = synthetic(0, 2.0, 60.0, (8,))
    assert set(workload.adapter.tolist()) == {BASE} and workload.ranks == ()
    assert workload.prompt_tokens.tolist() == synthetic(1, 2.0, 60.0, (8,)).prompt_tokens.tolist()


def test_the_arena_stand_in_has_the_published_means_and_span() -> None:
    workload = arena_like(10.0, 300.0, (64, 32, 16, 8))
    assert len(workload) == 3000 and len(workload.ranks) == 26
    assert workload.prompt_tokens.mean() == pytest.approx(85, rel=0.05)
    assert workload.output_tokens.mean() == pytest.approx(165, rel=0.05)
    for lengths in (workload.prompt_tokens, workload.output_tokens):
        assert lengths.min() >= 1 and lengths.max() < 512
    assert (workload.arrival[0], workload.arrival[-1]) == (0.0, 300.0)
    popular = np.bincount(workload.adapter, minlength=26)
    assert popular[0] > 3 * popular[-1] > 0


def test_azure_keeps_order_and_lengths_and_rescales_time(tmp_path) -> None:
    file = tmp_path / "trace.csv"
    lines = [
        "2023-11-16 18:15:46.6805900,374,44",
        "2023-11-16 18:15:50.6805900,5000,9",
        "2023-11-16 18:15:56.6805900,8,3",
    ]
    file.write_text("\n".join(["TIMESTAMP,ContextTokens,GeneratedTokens", *lines]) + "\n")
    workload = azure(file, 4, 0.5, 4.0, (8,))
    assert workload.prompt_tokens.tolist() == [374, 8]  # the long one is left out
    assert workload.arrival.tolist() == [0.0, 4.0]
    with pytest.raises(ValueError, match="2 requests of fewer than 2048 tokens, of 8 wanted"):
        azure(file, 4, 2.0, 4.0, (8,))


@pytest.mark.parametrize("make", [lambda: synthetic(20, 4.0, 60.0, (8, 16)), lambda: arena_like(4.0, 60.0, (8, 16))])
def test_the_same_seed_gives_the_same_requests(make) -> None:
    first, second = make(), make()
    for field in ("arrival", "adapter", "prompt_tokens", "output_tokens"):
        assert np.array_equal(getattr(first, field), getattr(second, field))


@pytest.mark.parametrize(
    ("arrival", "adapter", "message"),
    [([0.0, 1.0], [0], "arrays of"), ([1.0, 0.0], [0, 0], "must not decrease"), ([0.0, 1.0], [0, 1], "below 1")],
)
def test_an_impossible_workload_is_refused(arrival, adapter, message) -> None:
    with pytest.raises(ValueError, match=message):
        Workload(np.array(arrival), np.array(adapter), np.array([1, 1]), np.array([1, 1]), (8,))
