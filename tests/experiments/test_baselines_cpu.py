"""The side by side of all systems, in miniature."""

import json
from dataclasses import replace

import pytest

from experiments.baselines_cpu import QUICK, compare


def test_the_comparison_times_every_system_and_compares_tokens(tmp_path):
    names = ["slora", "base", "merge", "packed"]
    results = compare(replace(QUICK, rounds=2, adapters=5), names, tmp_path)
    assert list(results["out_of_memory"]) == ["packed"]  # 120 pages make room for three replicas, not for five
    same = results["requests_with_the_tokens_of_slora"]
    assert same["slora"] == same["merge"] == f"{QUICK.requests} of {QUICK.requests}" != same["base"]
    assert all(len(results["rounds"][name]) == 2 for name in ("slora", "base", "merge"))
    rounds = zip(results["rounds"]["merge"], results["rounds"]["slora"], strict=True)
    ratios = [merge["throughput"] / slora["throughput"] for merge, slora in rounds]
    assert results["throughput_over_slora"]["merge"] == pytest.approx(sum(ratios) / 2, abs=1e-3)
    assert results["throughput_over_slora"]["slora"] == 1.0
    assert results["provenance"]["versions"]["jax"]
    json.dumps(results, default=str)
