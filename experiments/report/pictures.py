"""Pictures of an experiment: our results beside the published ones."""

from __future__ import annotations

import io
from collections.abc import Sequence
from typing import Any

import numpy as np

from experiments.report.collect import Collected, Panel, Point
from experiments.runners.figures import AXIS_LABELS

COLORS = {
    "slora": "tab:blue",
    "no-unify-mem": "tab:orange",
    "bmm": "tab:green",
    "merge": "tab:red",
    "lcfs": "tab:purple",
    "abort": "tab:brown",
    "vllm-packed": "tab:olive",
    "peft": "tab:gray",
    "base model only": "black",
}
X_LABELS = {
    "adapters.count": "number of adapters",
    "workload.rate": "request rate (1/s)",
    "system.tensor_parallel_size": "devices",
    "workload.cv": "cv of the arrivals",
    "workload.alpha": "alpha (1: even, less: skewed)",
    "workload.exponent": "Zipf exponent of the adapters",
    "workload.prefix_tokens": "tokens of the shared beginning",
    "system.max_tokens": "rows of a step, at most",
    "client.users": "users",
}
LOGARITHMIC = (
    "latency",
    "first_token_latency",
    "first_token_latency_p99",
    "inter_token_latency_p99",
    "queue_time",
    "dollars_per_million_tokens",
)


def picture(collected: Collected, panels: Sequence[Panel] | None = None, kind: str = "png") -> bytes:
    """Plots a column for each panel and a row for each metric, as PNG or SVG. Ours are crosses on dashed lines
    (simulated) or squares (measured); published values are circles on solid lines."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch

    shown = collected.panels if panels is None else panels
    metrics = collected.experiment.metrics
    size = (3.5 * len(shown) + 0.7, 2.5 * len(metrics) + 1.0)
    fig, axes = plt.subplots(len(metrics), len(shown), figsize=size, squeeze=False)
    colors: dict[str, str] = {}
    for j, panel in enumerate(shown):
        for i, metric in enumerate(metrics):
            _plot(axes[i][j], panel, metric, colors)
            if j == 0:
                axes[i][j].set_ylabel(AXIS_LABELS.get(metric, metric.replace("_", " ")), fontsize=9)
        axes[0][j].set_title(panel.title, fontsize=10)
        axes[-1][j].set_xlabel(X_LABELS.get(panel.x, panel.x))
    points = [point for panel in shown for curve in panel.curves for point in curve.points]
    handles: list[Any] = [Line2D([], [], color=color, lw=2, label=name) for name, color in colors.items()]
    lines = any(panel.is_line for panel in shown)
    if any(point.published for point in points):
        handles.append(
            Line2D([], [], color="black", marker="o", ms=4, label="published")
            if lines
            else Patch(fill=False, edgecolor="black", label="published")
        )
    for label, (marker, line) in _STYLES.items():
        if lines and any(_label(point) == label for point in points):
            handles.append(Line2D([], [], color="black", marker=marker, ls=line, ms=5, label=label))
    if lines and any(point.fitted for point in points):
        handles.append(Line2D([], [], color="black", **_FITTED, label="fitted"))
    widest = 0.6 + 0.065 * max(len(str(handle.get_label())) for handle in handles)
    per_line = max(1, min(len(handles), int(size[0] / widest)))
    fig.legend(handles=handles, ncols=per_line, loc="lower center", frameon=False, fontsize=8)
    height = 0.1 + 0.2 * -(-len(handles) // per_line)
    fig.tight_layout(rect=(0, height / size[1], 1, 1))
    content = io.BytesIO()
    fixed = {"Software": None} if kind == "png" else {"Date": None}
    with plt.rc_context({"svg.hashsalt": "slora", "svg.fonttype": "none"}):
        fig.savefig(content, format=kind, dpi=110, metadata=fixed)
    plt.close(fig)
    return content.getvalue()


_FITTED = {"marker": "o", "ms": 10, "mfc": "none", "ls": ""}
_STYLES = {"simulated": ("x", "--"), "measured": ("s", "-.")}


def _label(point: Point) -> str:
    return "simulated" if point.run.config.mode == "simulated" else "measured"


def _plot(axes: Any, panel: Panel, metric: str, colors: dict[str, str]) -> None:
    if not panel.is_line:
        _bars(axes, panel, metric, colors)
        return
    for curve in panel.curves:
        color = colors.setdefault(curve.name, COLORS.get(curve.name, f"C{len(colors) % 10}"))
        points = sorted(curve.points, key=lambda point: point.at)
        published = [(p.at, y) for p in points if (y := p.theirs(metric)) is not None]
        if published:
            axes.plot(*np.transpose(published), "o-", ms=4, color=color)
        ours = [(p.at, y) for p in points if (y := p.ours(metric)) is not None]
        if ours:
            marker, line = _STYLES[_label(points[0])]
            axes.plot(*np.transpose(ours), marker=marker, ls=line, ms=5, color=color)
        fitted = [(p.at, y) for p in points if p.fitted and (y := p.ours(metric)) is not None]
        if fitted:
            axes.plot(*np.transpose(fitted), **_FITTED, color=color)
    values = {point.at for curve in panel.curves for point in curve.points}
    if min(values) >= 0 and max(values) > 15 * max(min(values - {0}, default=1), 1):
        axes.set_xscale("symlog", linthresh=1)
    axes.set_xticks(sorted(values), [f"{value:g}" for value in sorted(values)], fontsize=8)
    axes.minorticks_off()
    if metric in LOGARITHMIC:
        _logarithmic(axes)
    else:
        axes.set_ylim(0, 1.06 * max((line.get_ydata().max() for line in axes.lines), default=1) or 1)
    axes.grid(alpha=0.3)


def _logarithmic(axes: Any) -> None:
    """Makes the axis logarithmic, with plain numbers and at least a decade."""
    from matplotlib.ticker import LogLocator, NullFormatter

    axes.set_yscale("log")
    low, high = axes.get_ylim()
    if high < 10 * low:
        axes.set_ylim((low * high / 10) ** 0.5, (low * high * 10) ** 0.5)
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_major_formatter("{x:g}")
    axes.yaxis.set_minor_formatter(NullFormatter())


def _bars(axes: Any, panel: Panel, metric: str, colors: dict[str, str]) -> None:
    """Draws a group of bars for each place, one per curve; published values are outlined over ours."""
    width = 0.8 / len(panel.curves)
    for index, curve in enumerate(panel.curves):
        color = colors.setdefault(curve.name, COLORS.get(curve.name, f"C{len(colors) % 10}"))
        for point in curve.points:
            place = panel.places.index(point.at if point.at in panel.places else str(point.at))
            at = place + (index - (len(panel.curves) - 1) / 2) * width
            ours, theirs = point.ours(metric), point.theirs(metric)
            if ours is not None:
                axes.bar(at, ours, 0.9 * width, color=color, alpha=0.7)
            if theirs is not None:
                axes.bar(at, theirs, 0.9 * width, fill=False, edgecolor="black", lw=1.2)
    axes.set_xticks(range(len(panel.places)), [f"{p:g}" if isinstance(p, int | float) else p for p in panel.places])
    axes.tick_params(axis="x", labelsize=8)
    axes.grid(alpha=0.3, axis="y")
