"""Plots of the results, beside them; needs matplotlib."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

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
    written = []

    def figure(name: str, title: str, x: str, y: str, series: Series, goal: float) -> None:
        if not series:
            return
        from matplotlib import pyplot

        figure, axes = pyplot.subplots(figsize=(8, 5), layout="constrained")
        for label, points in series.items():
            axes.plot(*zip(*sorted(points), strict=True), marker="o", markersize=4, label=label)
        axes.axhline(goal, color="black", linestyle="--", linewidth=1, label=f"goal: {goal:g}")
        axes.set_xscale("log", base=2)
        axes.set(title=title, xlabel=x, ylabel=y, ylim=(0, None))
        axes.legend(fontsize="small")
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

    for model in sorted({row["facts"]["model"] for row in of("lora", "decode")}):
        decode = [row for row in of("lora", "decode") if row["facts"]["model"] == model]
        figure(
            f"lora_decode_{model}",
            f"LoRA, decode, {model}: bytes that must move, per time",
            "distinct adapters",
            "fraction of copy bandwidth",
            _series(decode, "adapters", fraction, "{system}, {rows} rows, rank {rank}"),
            0.8,
        )
    figure(
        "lora_prefill",
        "LoRA, prefill: time over the larger floor",
        "distinct adapters",
        "time / floor",
        _series(of("lora", "prefill"), "adapters", ratio, "{system}, rank {rank}"),
        1.3,
    )
    figure(
        "attention",
        "Paged attention, decode: keys and values, per time",
        "context (tokens)",
        "fraction of copy bandwidth",
        _series(of("attention", "decode"), "context", fraction, "{system}, batch {batch}"),
        0.8,
    )
    steps: Series = {}
    for row in of("step", "decode"):
        if row["system"] != "base":
            point = (float(row["system"].split()[0]), ratio(row))
            steps.setdefault(f"batch {row['facts']['batch']}", []).append(point)
    figure(
        "step",
        "A decode step with adapters, over base-only plus the floor of the LoRA bytes",
        "distinct adapters",
        "time / expected time",
        steps,
        1.15,
    )
    return written


def _series(rows: Iterable[Row], x: str, y: Callable[[Row], float], label: str) -> Series:
    series: Series = {}
    for row in rows:
        name = label.format(system=row["system"], **row["facts"])
        series.setdefault(name, []).append((float(row["facts"][x]), y(row)))
    return series
