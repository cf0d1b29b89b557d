"""The mechanisms side by side, in miniature."""

import json
from dataclasses import replace

import pytest

from experiments.mechanisms import loads
from experiments.mechanisms.__main__ import PARTS, compare
from experiments.mechanisms.scale import FULL, QUICK
from experiments.mechanisms.table import table


@pytest.fixture(scope="module")
def results():
    return compare(QUICK, list(PARTS))


def rounds(results, comparison):
    """Load, side and figures of every round."""
    for load, result in results["engine"][comparison]["loads"].items():
        for side, figures in result["rounds"].items():
            for figure in figures:
                yield load, side, figure


def test_every_side_generates_the_same_tokens(results):
    for comparison in results["engine"].values():
        for load in comparison["loads"].values():
            same = load["requests_with_the_tokens_of_the_first"]
            assert set(same.values()) == {load["requests"]}, same


def test_the_counters_show_which_mechanism_was_on(results):
    for _, side, figures in rounds(results, "prefetch"):
        assert figures["adapter_loads"] > 0 == figures["prefix_hit_tokens"]
        assert figures["prefetch_hits"] + figures["prefetches_wasted"] <= figures["adapter_loads"]
        assert side == "prefetch 8" or figures["prefetch_hits"] == figures["prefetches_wasted"] == 0
    hits = [figures["prefetch_hits"] for _, side, figures in rounds(results, "prefetch") if side == "prefetch 8"]
    assert sum(hits) > 0
    for _, side, figures in rounds(results, "prefix"):
        assert (figures["prefix_hit_tokens"] > 0) == (side == "prefix cache")
        assert figures["tokens_computed"] >= figures["prompt_tokens"] - figures["prefix_hit_tokens"]
    by_side = {side: figures for _, side, figures in rounds(results, "eviction")}
    assert by_side["immediate"]["prefix_hit_tokens"] < by_side["lru"]["prefix_hit_tokens"]
    assert by_side["immediate"]["adapter_loads"] > by_side["lru"]["adapter_loads"]
    assert results["engine"]["eviction"]["sides"]["cost-aware"]["costs"]["recompute_page"] > 0


def test_medians_and_ratios_are_of_the_rounds(results):
    load = results["engine"]["memory"]["loads"]["shifting"]
    (split,) = (side for side in load["rounds"] if side != "unified")
    (own,), (unified,) = load["rounds"][split], load["rounds"]["unified"]
    assert load["median"][split] == own
    assert load["over_the_first"][split]["requests_per_second"] == pytest.approx(
        own["requests_per_second"] / unified["requests_per_second"]
    )
    assert all(ratio == 1 for ratio in load["over_the_first"]["unified"].values())


def test_the_simulated_sides_have_equal_memory(results):
    assert set(results["simulator"]) == {"prefetch", "prefetch, most adapters on disk", "memory"}
    for comparison, cases in results["simulator"].items():
        for case in cases.values():
            assert len(case["figures"]) == 2 and all(f["requests_per_second"] > 0 for f in case["figures"].values())
            reads = [figures["disk_reads"] > 0 for figures in case["figures"].values()]
            assert reads == 2 * ["disk" in comparison]


def test_the_results_are_json_and_a_table(results):
    assert results["provenance"]["versions"]["jax"] and results["settings"]["rounds"] == QUICK.rounds
    json.dumps(results, default=str)
    lines = "\n".join(table(results))
    assert all(part in lines for part in (*results["engine"], "simulated memory"))


def test_a_cycle_of_cold_adapters_repeats_none_within_a_round():
    seen = [request.adapter for request in loads.mostly_cold(FULL, 3, 10.0) if int(request.adapter) >= loads.HOT]
    assert len(set(seen)) == len(seen) > 0.1 * FULL.requests


def test_a_conversation_goes_on_from_round_to_round():
    scale = replace(QUICK, requests=300)
    first, second = ({r.prompt: r.adapter for r in loads.conversations(scale, number)} for number in (0, 1))
    continued = [prompt for prompt in second if prompt[: -loads.TURN] in first]
    assert continued and all(second[prompt] == first[prompt[: -loads.TURN]] for prompt in continued)
