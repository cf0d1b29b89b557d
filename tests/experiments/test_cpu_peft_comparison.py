"""The comparison with PEFT, in miniature: both sides give the same tokens, and every ratio has its two sides."""

import numpy as np
import pytest

from experiments.cpu_peft_comparison import QUICK, compare, workload
from experiments.pool_picture import KINDS, draw


def test_the_comparison_runs_and_both_libraries_give_the_same_tokens(tmp_path):
    results = compare(QUICK, tmp_path)
    assert results["tokens_agree"]
    for pair, said in results["tokens_agree"].items():
        assert said == f"{QUICK.requests} of {QUICK.requests} requests, every token", pair
    rates = results["output_tokens_per_second"]
    assert set(rates) >= {"slora/base", "slora/3", "peft-grouped/3", "peft-mixed/3", "slora-many/10"}
    assert all(len(rate["rounds"]) == QUICK.rounds and rate["median"] > 0 for rate in rates.values())
    expected = rates["slora/3"]["median"] / rates["peft-grouped/3"]["median"]
    assert results["ratios_median_over_rounds"]["slora over peft-grouped, 3 adapters"] == pytest.approx(
        expected, rel=0.01
    )
    assert results["provenance"]["versions"]["peft"]


@pytest.mark.parametrize(("requests", "adapters"), [(64, 32), (64, 1), (10, 1000), (7, 3)])
def test_a_workload_spreads_its_requests_evenly_over_the_adapters(requests, adapters):
    names = workload(QUICK, requests, adapters).adapters
    _, counts = np.unique(names, return_counts=True)
    assert len(names) == requests
    assert len(counts) == min(requests, adapters)
    assert counts.max() - counts.min() <= 1


def test_the_pool_picture_is_drawn(tmp_path):
    history = [np.arange(30) % len(KINDS), np.zeros(30, int)]
    draw(history, tmp_path / "pool.png")
    assert (tmp_path / "pool.png").read_bytes().startswith(b"\x89PNG")
