"""Traces a running engine and draws the trace: `python -m experiments.run_trace [--picture docs/trace.png]`.

Open the trace in https://ui.perfetto.dev or chrome://tracing. To make reads and copies visible, the engine is tiny, its
host memory holds a few of its adapters, each read from disk is slowed by 20 ms, and each step copies at most four pages
of adapters to the device.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes

from experiments.pool_picture import (
    COLOURS,
    FREE,
    IDLE,
    IN_USE,
    KINDS,
    KV,
    PREFIX_IDLE,
    PREFIX_IN_USE,
    serve,
    tiny_engine,
)
from experiments.slow_disk import slow_disk
from slora_jax import RequestOutput
from slora_jax.engine import Trace
from slora_jax.metrics import ServingMetrics, adapter_metrics, pool_use, serving_metrics

Event = dict[str, Any]
PAGES = {  # in the order of the stack, from below
    "kv": KV,
    "prefix_in_use": PREFIX_IN_USE,
    "adapter_in_use": IN_USE,
    "prefix_idle": PREFIX_IDLE,
    "adapter_idle": IDLE,
    "free": FREE,
}
LABELS = {name: KINDS[kind] for name, kind in PAGES.items()}
LANES = {  # lane: (how the track's name begins, names of its events or all, colour)
    "host works": ("host", {"schedule", "dispatch", "outputs"}, "#59636f"),
    "host waits": ("host", {"wait for device"}, "#c3cad3"),
    "device, even": ("device, even", None, "#3b7dd8"),
    "device, odd": ("device, odd", None, "#7fb0ee"),
    "uploads": ("adapter uploads", None, "#e8743b"),
    "disk": ("disk", None, "#4c9f70"),
}
ZOOM_MS = 60.0


def run(path: Path, disk_seconds: float, seed: int = 0) -> tuple[Trace, list[RequestOutput]]:
    """Serves the requests of `pool_picture`, traced to `path`. Returns the trace and the finished requests."""
    outputs = []
    with (
        tiny_engine(seed, host_adapter_bytes=1 << 20, upload_pages_per_step=4) as engine,
        slow_disk(disk_seconds),
        engine.trace(path) as trace,
    ):
        for deltas in serve(engine, seed):
            outputs += [delta.output for delta in deltas if delta.output is not None]
    return trace, outputs


def tracks(events: Sequence[Event]) -> dict[str, list[Event]]:
    """Returns the complete events by the name of their track."""
    names = {e["tid"]: e["args"]["name"] for e in events if e["name"] == "thread_name"}
    by_track: dict[str, list[Event]] = {name: [] for name in names.values()}
    for event in events:
        if event["ph"] == "X":
            by_track[names[event["tid"]]].append(event)
    return by_track


def counters(events: Sequence[Event], name: str) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """Returns the times in ms, and the values by series, of the counter track whose name begins with `name`."""
    samples = [e for e in events if e["ph"] == "C" and e["name"].startswith(name)]
    series = {key: np.array([e["args"][key] for e in samples]) for key in samples[0]["args"]}
    return np.array([e["ts"] for e in samples]) / 1e3, series


def draw(events: Sequence[Event], output: Path) -> None:
    """Writes the picture of a trace: the tracks for a moment and for the whole run, the pool, the queues."""
    figure, axes = plt.subplots(
        4, 1, figsize=(11, 9), height_ratios=(1.3, 1.3, 1.6, 0.9), layout="constrained", sharex="none"
    )
    zoom, lanes, pool, queues = axes
    by_track = tracks(events)
    end = max(e["ts"] + e.get("dur", 0) for e in events if "ts" in e) / 1e3
    uploads = [e for name, track in by_track.items() if name.startswith("adapter uploads") for e in track]
    reads = [e for name, track in by_track.items() if name.startswith("disk") for e in track if e["name"] == "read"]
    middle = max(
        (e["ts"] / 1e3 for e in uploads), key=lambda ms: _happens(by_track, uploads, reads, ms), default=end / 2
    )
    _draw_lanes(zoom, by_track, middle - ZOOM_MS / 6, middle + ZOOM_MS * 5 / 6)
    zoom.set_title(
        f"Steps go on while adapters are read from disk and copied to the device: {ZOOM_MS:.0f} ms of the run"
    )
    _draw_lanes(lanes, by_track, 0, end)
    lanes.axvspan(middle - ZOOM_MS / 6, middle + ZOOM_MS * 5 / 6, color="#00000014", lw=0)
    lanes.set_title("The whole run")
    times, pages = counters(events, "pool")
    pool.stackplot(
        times, [pages[kind] for kind in PAGES], colors=[COLOURS[k] for k in PAGES.values()], labels=LABELS.values(),
        step="post",
    )  # fmt: skip
    pool.set(ylabel="pages", ylim=(0, sum(series[0] for series in pages.values())))
    pool.set_title("The pool by kind of page")
    times, requests = counters(events, "queues")
    for (name, values), colour in zip(requests.items(), ("#3b7dd8", "#8a94a6"), strict=True):
        queues.step(times, values, where="post", color=colour, label=name)
    queues.set(ylabel="requests", xlabel="ms", ylim=(0, None))
    for axis in (lanes, pool, queues):
        axis.set_xlim(0, end)
    for axis in (pool, queues):
        axis.legend(loc="upper left", bbox_to_anchor=(1.0, 1.0), frameon=False)
    for axis in axes:
        axis.spines[["top", "right"]].set_visible(False)
    output.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(output, dpi=110)
    plt.close(figure)


def _happens(by_track: dict[str, list[Event]], uploads: list[Event], reads: list[Event], ms: float) -> int:
    """Rates the zoom around a time: steps dispatched, times uploads, times reads."""
    dispatches = [e for e in by_track["host"] if e["name"] == "dispatch"]
    first, last = (ms - ZOOM_MS / 6) * 1e3, (ms + ZOOM_MS * 5 / 6) * 1e3
    counts = [sum(first <= e["ts"] < last for e in events) for events in (dispatches, uploads, reads)]
    return counts[0] * counts[1] * (1 + counts[2])


def _draw_lanes(axis: Axes, by_track: dict[str, list[Event]], first: float, last: float) -> None:
    """Draws one lane per kind of track, between two times in ms."""
    for row, (prefix, wanted, colour) in enumerate(LANES.values()):
        events = [e for name, track in by_track.items() if name.startswith(prefix) for e in track]
        events = [e for e in events if wanted is None or e["name"] in wanted]
        bars = np.array([(e["ts"] / 1e3, e["dur"] / 1e3) for e in events]).reshape(-1, 2)
        bars = bars[(bars.sum(1) >= first) & (bars[:, 0] <= last)]
        bars[:, 1] = np.maximum(bars[:, 1], (last - first) / 1500)  # wide enough to see
        axis.broken_barh(bars.tolist(), (row - 0.38, 0.76), color=colour, edgecolor="white", lw=0.3)
    axis.set_yticks(range(len(LANES)), list(LANES))
    axis.set(xlim=(first, last), ylim=(len(LANES) - 0.4, -0.6))


def report(trace: Trace, outputs: Sequence[RequestOutput]) -> list[str]:
    """Returns the run in numbers, one line each."""
    records = [output.record() for output in outputs]
    metrics: ServingMetrics = serving_metrics(records)
    adapters = adapter_metrics(records, trace.stays(), trace.start, trace.samples[-1].time)
    worst = max(adapters, key=lambda name: adapters[name].queue_time.mean)
    shares = ", ".join(f"{LABELS[kind]} {share:.0%}" for kind, share in pool_use(trace.samples).mean.items())
    gap, first = metrics.inter_token_latency, metrics.first_token_latency
    return [
        f"{metrics.completed} of {metrics.requests} requests in {metrics.wall_seconds:.2f} s: {metrics.throughput:.1f} "
        f"requests/s, {metrics.token_throughput:.0f} tokens/s",
        f"first token: mean {first.mean:.3f} s, p99 {first.p99:.3f} s; attainment {metrics.attainment:.2f}, "
        f"satisfaction {metrics.satisfaction:.3f}",
        f"between tokens: median {gap.p50 * 1e3:.1f} ms, p99 {gap.p99 * 1e3:.1f} ms, "
        f"longest {gap.maximum * 1e3:.1f} ms",
        f"adapters: {sum(a.loads for a in adapters.values())} loads, {sum(a.evictions for a in adapters.values())} "
        f"evictions; longest mean queue: {worst}, {adapters[worst].queue_time.mean:.3f} s",
        f"prompt tokens found in the prefix cache: {sum(r.cached_tokens for r in records)} of "
        f"{sum(r.prompt_tokens for r in records)}",
        f"pool, mean over time: {shares}",
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--trace", type=Path, default=Path("run.trace.json"))
    parser.add_argument("--picture", type=Path, default=Path("docs/trace.png"))
    parser.add_argument("--disk-ms", type=float, default=20.0, help="by how much each read from disk is slowed")
    args = parser.parse_args()
    print("\n".join(report(*run(args.trace, args.disk_ms / 1e3))))
    draw(json.loads(args.trace.read_text())["traceEvents"], args.picture)
    print(f"written to {args.trace} and {args.picture}")


if __name__ == "__main__":
    main()
