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
        "CPU: prefetch, requests with cold adapters",
        "first token, mean, ms",
        1e3,
    )
    _bars(
        axes[0, 1],
        {_short(name): load["rounds"] for name, load in engine["memory"]["loads"].items()},
        "requests_per_second",
        "CPU: one pool or a fixed split",
        "requests/s",
    )
    cached = {
        "shared\ninstructions": engine["prefix"]["loads"]["shared instructions"]["rounds"],
        "conversations,\nmany adapters": engine["eviction"]["loads"]["conversations"]["rounds"],
    }
    _bars(
        axes[0, 2], cached, "requests_per_second", "CPU: prefix cache; what is evicted first", "requests/s", named=True
    )
    _simulated(axes[1, 0], simulator["prefetch"], "first_token_mean", "Simulated: prefetch", "first token, mean, s")
    _simulated(
        axes[1, 1],
        simulator["prefetch, most adapters on disk"],
        "first_token_mean",
        "Simulated: prefetch, 90% of adapters on disk",
        "first token, mean, s",
    )
    _simulated(
        axes[1, 2], simulator["memory"], "requests_per_second", "Simulated: one pool or a fixed split", "requests/s"
    )
    figure.savefig(output, dpi=100)
    plt.close(figure)


def _simulated(axes: Axes, cases: Mapping[str, Any], key: str, title: str, label: str) -> None:
    groups = {
        name.replace(" ", "\n", 1): {side: [figures] for side, figures in case["figures"].items()}
        for name, case in cases.items()
    }
    _bars(axes, groups, key, title, label)


def _bars(
    axes: Axes,
    groups: Mapping[str, Mapping[str, Sequence[Mapping[str, float]]]],
    key: str,
    title: str,
    label: str,
    factor: float = 1.0,
    named: bool = False,
) -> None:
    """A group of bars for each load, a bar for each side: the median of its rounds, and the rounds as dots. named:
    sides are named below their bars, as they differ from group to group; else in a legend."""
    most = max(map(len, groups.values()))
    width = 0.8 / most
    ticks: list[tuple[float, str]] = []
    top = 0.0
    for place, (group, sides) in enumerate(groups.items()):
        for i, (side, rounds) in enumerate(sides.items()):
            values = sorted(factor * figures[key] for figures in rounds)
            median = (values[(len(values) - 1) // 2] + values[len(values) // 2]) / 2
            x = place + (i - (len(sides) - 1) / 2) * width
            axes.bar(x, median, 0.9 * width, color=COLOURS[i], label=None if place or named else side)
            if len(values) > 1:
                axes.plot([x] * len(values), values, ".", color="#333333", markersize=4)
            top = max(top, values[-1])
            axes.annotate(f"{median:.3g}", (x, values[-1]), (0, 4), textcoords="offset points", ha="center", fontsize=8)
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
