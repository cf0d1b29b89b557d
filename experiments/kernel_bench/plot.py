"""Plots of the results; needs matplotlib."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from experiments.kernel_bench.goals import PEERS, Row, fraction, ratio

BANDWIDTH, FLOOR = ("fraction of copy bandwidth", fraction), ("time / floor", ratio)


def _adapters(row: Row) -> float:
    """Distinct adapters of a case; of a whole step, in its system's name."""
    return float(row["facts"].get("adapters") or row["system"].split()[0])


def _context(row: Row) -> float:
    return float(row["facts"]["context"])


def _is(op: str, regime: str, also: Callable[[Row], bool] = lambda row: True) -> Callable[[Row], bool]:
    return lambda row: (row["op"], row["regime"]) == (op, regime) and also(row)


FIGURES = (
    ("lora_decode", "LoRA, decode: bytes that must move, per time", "distinct adapters", _adapters, BANDWIDTH, 0.8,
     "{system}, {rows} rows", _is("lora", "decode", lambda row: row["importance"] == 0)),
    ("lora_ranks", "LoRA kernels, decode: bytes that must move, per time", "distinct adapters", _adapters, BANDWIDTH,
     0.8, "{system}, {rows} rows, rank {rank}",
     _is("lora", "decode", lambda row: row["importance"] < 2 and row["system"] not in PEERS)),
    ("lora_prefill", "LoRA, prefill: time over the larger floor", "distinct adapters", _adapters, FLOOR, 1.3,
     "{system}, rank {rank}",
     _is("lora", "prefill", lambda row: row["importance"] == 0 or row["system"] not in PEERS)),
    ("attention", "Paged attention, decode: keys and values, per time", "context (tokens)", _context, BANDWIDTH, 0.8,
     "{system}, batch {batch}", _is("attention", "decode")),
    ("step", "A decode step with adapters, over base-only plus the floor of the LoRA bytes", "distinct adapters",
     _adapters, FLOOR, 1.15, "batch {batch}", _is("step", "decode", lambda row: row["system"] != "base")),
)  # fmt: skip
"""Name, title, x axis, its value, y axis and its value, goal, label of a line, rows."""


def plot(results: dict[str, Any], path: Path) -> list[Path]:
    """Draws every figure that has results, as `<path without suffix>_<name>.png`.

    Raises:
      ModuleNotFoundError: matplotlib is not installed.
    """
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    found = {"device": "", "date": "", "git": ""} | results.get("provenance", {})
    source = "MINIATURE: NUMBERS MEAN NOTHING. " * bool(results.get("miniature"))
    source += f"{found['device']}, {found['date']}, {found['git']}"
    written = []
    for name, title, x_label, x, (y_label, y), goal, label, chosen in FIGURES:
        lines: dict[str, list[tuple[float, float]]] = {}
        for row in results["rows"]:
            if "over_floor" in row and chosen(row):
                lines.setdefault(label.format(**(row | row["facts"])), []).append((x(row), y(row)))
        if not lines:
            continue
        figure, axes = pyplot.subplots(figsize=(10, 5), layout="constrained")
        for text, points in lines.items():
            axes.plot(*zip(*sorted(points), strict=True), marker="o", markersize=4, label=text)
        axes.axhline(goal, color="black", linestyle="--", linewidth=1, label=f"goal: {goal:g}")
        axes.set(title=title, xlabel=x_label, ylabel=y_label)
        axes.set_xscale("log", base=2)
        if name == "lora_prefill":
            axes.set_yscale("log")
        else:
            axes.set_ylim(0, None)
        axes.legend(fontsize="small", loc="center left", bbox_to_anchor=(1, 0.5))
        figure.text(0.01, 0.005, source, fontsize=6)
        written.append(path.with_name(f"{path.stem}_{name}.png"))
        figure.savefig(written[-1], dpi=120)
        pyplot.close(figure)
    return written
