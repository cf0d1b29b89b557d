"""The results in a few columns."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

COLUMNS = {
    "requests_per_second": "requests/s",
    "first_token_mean": "first token s",
    "inter_token_p99": "gap p99 s",
    "queue_mean": "queue s",
    "most_running": "running",
    "preemptions": "preempted",
    "adapter_loads": "loads",
}


def table(results: Mapping[str, Any]) -> Iterator[str]:
    """Lines: medians of every side, with its throughput over the first's."""
    for comparison, result in results["engine"].items():
        for load, rounds in result["loads"].items():
            yield from _rows(f"{comparison}: {load}", rounds["median"], rounds["over_the_first"])
            same = rounds["requests_with_the_tokens_of_the_first"]
            yield f"  same tokens as the first, of {rounds['requests']} requests: {same}"
    for comparison, cases in results["simulator"].items():
        for case, result in cases.items():
            yield from _rows(f"simulated {comparison}: {case}", result["figures"], result["over_the_first"])


def _rows(title: str, figures: Mapping[str, Any], over: Mapping[str, Any]) -> Iterator[str]:
    yield f"\n{title:48s} {'over first':>10s} " + " ".join(f"{name:>13s}" for name in COLUMNS.values())
    for side, values in figures.items():
        cells = " ".join(f"{values[key]:13.4g}" for key in COLUMNS)
        yield f"  {side:46s} {over[side]['requests_per_second']:10.3f} {cells}"
