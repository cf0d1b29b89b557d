"""Plots of the results, beside them; needs matplotlib."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from pallas_kernels.bench.goals import PEERS

Row = dict[str, Any]
Series = dict[str, list[tuple[float, float]]]


def plot(results: dict[str, Any], path: Path) -> list[Path]:
    """Draws every plot that there are results for, as `<path without suffix>_<name>.png`.

    Raises ModuleNotFoundError where matplotlib is not installed.
    """
    import matplotlib

    matplotlib.use("agg")
    rows = [row for row in results["rows"] if "over_floor" in row]
    provenance = results.get("provenance", {})
    source = f"{provenance.get('device', '')}, {provenance.get('date', '')}, {provenance.get('git', '')}"
    if results.get("miniature"):
        source = f"MINIATURE: NUMBERS MEAN NOTHING. {source}"
    written: list[Path] = []
    bandwidth = "fraction of copy bandwidth"

    def figure(name: str, title: str, x: str, y: str, series: Series, goal: float, log: bool = False) -> None:
        if not series:
            return
        from matplotlib import pyplot

        figure, axes = pyplot.subplots(figsize=(10, 5), layout="constrained")
        for label, points in series.items():
            axes.plot(*zip(*sorted(points), strict=True), marker="o", markersize=4, label=label)
        axes.axhline(goal, color="black", linestyle="--", linewidth=1, label=f"goal: {goal:g}")
        axes.set_xscale("log", base=2)
        if log:
            axes.set_yscale("log")
        else:
            axes.set_ylim(0, None)
        axes.set(title=title, xlabel=x, ylabel=y)
        axes.legend(fontsize="small", loc="center left", bbox_to_anchor=(1, 0.5))
        figure.text(0.01, 0.005, source, fontsize=6)
        written.append(path.with_name(f"{path.stem}_{name}.png"))
        figure.savefig(written[-1], dpi=120)
        pyplot.close(figure)

    def of(op: str, regime: str) -> list[Row]:
        return [row for row in rows if (row["op"], row["regime"]) == (op, regime)]

    def fraction(row: Row) -> float:
        return row["bandwidth_fraction"] or 0.0

    def ratio(row: Row) -> float:
        return row["over_floor"]

    decode, prefill = of("lora", "decode"), of("lora", "prefill")
    for name, title, chosen, label in (
        ("lora_decode", "LoRA, decode", [row for row in decode if row["importance"] == 0], "{system}, {rows} rows"),
        ("lora_ranks", "LoRA, decode, the better kernel", _best(decode, fraction), "{rows} rows, rank {rank}"),
    ):
        model = {row["facts"]["model"] for row in chosen if row["importance"] < 2}
        chosen = [row for row in chosen if row["facts"]["model"] in model]
        lines = _series(chosen, "adapters", fraction, label)
        figure(name, f"{title}: bytes that must move, per time", "distinct adapters", bandwidth, lines, 0.8)
    chosen = [row for row in prefill if row["importance"] == 0 or _kernel(row)]
    lines = _series(chosen, "adapters", ratio, "{system}, rank {rank}")
    title = "LoRA, prefill: time over the larger floor"
    figure("lora_prefill", title, "distinct adapters", "time / floor", lines, 1.3, log=True)
    lines = _series(of("attention", "decode"), "context", fraction, "{system}, batch {batch}")
    title = "Paged attention, decode: keys and values, per time"
    figure("attention", title, "context (tokens)", bandwidth, lines, 0.8)
    steps: Series = {}
    for row in of("step", "decode"):
        if row["system"] != "base":
            point = (float(row["system"].split()[0]), ratio(row))
            steps.setdefault(f"batch {row['facts']['batch']}", []).append(point)
    title = "A decode step with adapters, over base-only plus the floor of the LoRA bytes"
    figure("step", title, "distinct adapters", "time / expected time", steps, 1.15)
    return written


def _best(rows: Iterable[Row], number: Callable[[Row], float]) -> list[Row]:
    """Of each case the kernel with the highest number."""
    best: dict[str, Row] = {}
    for row in filter(_kernel, rows):
        if row["label"] not in best or number(row) > number(best[row["label"]]):
            best[row["label"]] = row
    return list(best.values())


def _kernel(row: Row) -> bool:
    return row["system"] not in PEERS


def _series(rows: Iterable[Row], x: str, y: Callable[[Row], float], label: str) -> Series:
    series: Series = {}
    for row in rows:
        name = label.format(system=row["system"], **row["facts"])
        series.setdefault(name, []).append((float(row["facts"][x]), y(row)))
    return series
