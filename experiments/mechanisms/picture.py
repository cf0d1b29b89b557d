"""The picture of the results: each mechanism's figures over those of the side that it is compared with."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
from matplotlib.axes import Axes

COLOURS = ("#3b7dd8", "#e8743b", "#2b9c8f", "#a78bcc")


def draw(results: Mapping[str, Any], output: Path) -> None:
    """Writes the picture of complete results. Above, the real engine on a CPU: medians over the rounds, with every
    round as a dot. Below, the simulator."""
    figure, axes = plt.subplots(2, 3, figsize=(14.5, 7.6), layout="constrained")
    engine, simulator = results["engine"], results["simulator"]
    loads = engine["prefetch"]["loads"]
    _bars(
        axes[0, 0],
        {name: load["rounds"] for name, load in loads.items()},
        "cold_first_token_mean",
        "CPU: prefetch, requests whose adapter is on disk",
        "first token, mean, ms",
        1e3,
    )
    _bars(
        axes[0, 1],
        {_short(name): load["rounds"] for name, load in engine["memory"]["loads"].items()},
        "requests_per_second",
        "CPU: one pool or a fixed split",
        "requests/s, over unified",
        relative=True,
    )
    cached = {
        "shared\ninstructions": engine["prefix"]["loads"]["shared instructions"]["rounds"],
        "conversations,\nmany adapters": engine["eviction"]["loads"]["conversations"]["rounds"],
    }
    title, label = "CPU: prefix cache, eviction", "requests/s, over the first"
    _bars(axes[0, 2], cached, "requests_per_second", title, label, named=True, relative=True)
    for place, comparison in enumerate(("prefetch", "prefetch, most adapters on disk")):
        cases = {_short_case(name): _one_round(case) for name, case in simulator[comparison].items()}
        label = "first token, mean, over prefetch 8"
        _bars(axes[1, place], cases, "first_token_mean", f"Simulated: {comparison}", label, relative=True)
    memory = {_short_case(name): _one_round(case) for name, case in simulator["memory"].items()}
    title, label = "Simulated: one pool or a fixed split", "requests/s, over unified"
    _bars(axes[1, 2], memory, "requests_per_second", title, label, relative=True)
    figure.savefig(output, dpi=100)
    plt.close(figure)


def _bars(
    axes: Axes,
    groups: Mapping[str, Mapping[str, Sequence[Mapping[str, float]]]],
    key: str,
    title: str,
    label: str,
    factor: float = 1.0,
    named: bool = False,
    relative: bool = False,
) -> None:
    """A group of bars for each load, a bar for each side: the median of its rounds, and the rounds as dots. named:
    sides are named below their bars, as they differ from group to group; else in a legend. relative: over the
    first side in the same round."""
    most = max(map(len, groups.values()))
    width = 0.8 / most
    ticks: list[tuple[float, str]] = []
    top = 0.0
    for place, (group, sides) in enumerate(groups.items()):
        first = next(iter(sides.values()))
        for i, (side, rounds) in enumerate(sides.items()):
            over = [figures[key] for figures in first] if relative else [1.0] * len(rounds)
            values = sorted(factor * figures[key] / one for figures, one in zip(rounds, over, strict=True))
            median = (values[(len(values) - 1) // 2] + values[len(values) // 2]) / 2
            x = place + (i - (len(sides) - 1) / 2) * width
            axes.bar(x, median, 0.9 * width, color=COLOURS[i], label=None if place or named else side)
            if len(values) > 1:
                axes.plot([x] * len(values), values, ".", color="#333333", markersize=4)
            top = max(top, values[-1])
            axes.annotate(f"{median:.3g}", (x, values[-1]), (0, 4), textcoords="offset points", ha="center", fontsize=7)
            if named:
                ticks.append((x, side.replace(" ", "\n").replace("-", "-\n")))
        if named:
            axes.text(place, 0.98, group, transform=axes.get_xaxis_transform(), ha="center", va="top", fontsize=9)
    if named:
        axes.set_xticks([x for x, _ in ticks], [name for _, name in ticks], fontsize=8)
    else:
        axes.set_xticks(range(len(groups)), list(groups), fontsize=9)
        axes.legend(frameon=False, fontsize=8, ncols=2, loc="upper left")
    axes.set(ylabel=label, ylim=(0, 1.35 * top))
    axes.set_title(title, fontsize=11)
    axes.spines[["top", "right"]].set_visible(False)


def _short(load: str) -> str:
    return load.replace(", ", ",\n")


def _short_case(case: str) -> str:
    return case.replace(" ", "\n", 1)


def _one_round(case: Mapping[str, Any]) -> dict[str, list[dict[str, float]]]:
    return {side: [figures] for side, figures in case["figures"].items()}
