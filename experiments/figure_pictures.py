"""A figure of the paper, published beside simulated."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from experiments.paper.figures import AXES, METRICS, Figure, Panel
from experiments.paper.results import PaperRow

COLORS = {
    "slora": "tab:blue",
    "no-unify-mem": "tab:orange",
    "bmm": "tab:green",
    "merge": "tab:red",
    "lcfs": "tab:purple",
    "abort": "tab:brown",
    "vllm-packed": "tab:olive",
    "peft": "tab:gray",
}
LOGARITHMIC = ("latency", "first_token_latency")


def draw(figure: Figure, ours: Mapping[PaperRow, Any], fitted: Collection[PaperRow], file: Path) -> None:
    """Writes a PNG: a row of plots per metric, a column per panel. Published values are circles on solid lines, ours
    crosses on dashed ones; a ring marks what the simulator was fitted to."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    from matplotlib.lines import Line2D

    rows, columns = len(figure.metrics), len(figure.panels)
    fig, axes = plt.subplots(rows, columns, figsize=(3.2 * columns + 0.8, 2.6 * rows + 1.0), squeeze=False)
    names: dict[str, str] = {}
    for j, panel in enumerate(figure.panels):
        for i, metric in enumerate(figure.metrics):
            names |= _plot(axes[i][j], panel, metric, ours, fitted)
            if j == 0:
                axes[i][j].set_ylabel(METRICS[metric])
        axes[0][j].set_title(panel.title, fontsize=10)
        axes[-1][j].set_xlabel(AXES[panel.axis])
    handles = [Line2D([], [], color=color, lw=2, label=name) for name, color in names.items()]
    handles += [
        Line2D([], [], color="black", marker="o", ms=4, label="published"),
        Line2D([], [], color="black", marker="x", ls="--", label="simulated"),
        Line2D([], [], color="black", marker="o", ms=10, mfc="none", ls="", label="fitted to"),
    ]
    fig.suptitle(figure.title, y=0.995)
    fig.legend(handles=handles, ncols=min(len(handles), 3 + 2 * columns), loc="lower center", frameon=False, fontsize=9)
    lines = -(-len(handles) // (3 + 2 * columns))
    fig.tight_layout(rect=(0, (0.12 + 0.22 * lines) / fig.get_figheight(), 1, 1))
    file.parent.mkdir(parents=True, exist_ok=True)
    fig.savefig(file, dpi=110)
    plt.close(fig)


def _plot(
    axes: Any, panel: Panel, metric: str, ours: Mapping[PaperRow, Any], fitted: Collection[PaperRow]
) -> dict[str, str]:
    """Draws one metric of a panel; the curves' names and colours."""
    names = {}
    for index, curve in enumerate(panel.curves):
        color = names[curve.name] = COLORS.get(curve.name, f"C{index}")
        at = [getattr(row, panel.axis) for row in curve.rows]
        axes.plot(at, [getattr(row, metric) for row in curve.rows], "o-", ms=4, color=color)
        found = [row for row in curve.rows if row in ours]
        axes.plot(
            [getattr(row, panel.axis) for row in found],
            [getattr(ours[row], metric) for row in found],
            "x--",
            color=color,
        )
        marked = [row for row in curve.rows if row in fitted]
        axes.plot(
            [getattr(row, panel.axis) for row in marked],
            [getattr(row, metric) for row in marked],
            "o",
            ms=10,
            mfc="none",
            color=color,
        )
    if metric in LOGARITHMIC:
        axes.set_yscale("log")
    else:
        axes.set_ylim(bottom=0)
    widest = max(getattr(row, panel.axis) for curve in panel.curves for row in curve.rows)
    if panel.axis == "num_adapters" and widest >= 1000:
        axes.set_xscale("log")
    axes.grid(alpha=0.3)
    return names
