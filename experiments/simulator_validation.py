"""The simulator against the paper's published runs: `python -m experiments.simulator_validation [--output DIR]`.

Every used row of the paper's raw results is simulated with its own workload and arguments. Rows that the efficiencies
were fitted to are marked and count in no error. Written: `validation.json` (every row; per system the errors; the order
of systems in every figure; the knees; speed). Pictures of the figures are the report's (`make paper`).
"""

from __future__ import annotations

import argparse
import math
import time
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from experiments.machine import provenance, write_json
from experiments.paper import PaperRow, load_rows
from experiments.paper.exclusions import exclusion
from experiments.paper.knees import find_knee, knee_error, knees_agree, rate_sweeps
from experiments.report.collect import Collected, published_figures
from experiments.report.order import check_order, violations
from experiments.simulated_rows import SimulatedRow, simulate_row, simulate_rows
from experiments.simulator_fit import fitting_labels

DEFAULT_OUTPUT = Path(__file__).parent / "results" / "simulator"
KNEE_TOLERANCE = 0.15
QUICK_ROWS = (
    ("synthetic/slora/synthetic_req_rate_a10g_S1_slora.jsonl", 1.5),
    ("real/slora/real_req_rate_a10g_S2_slora.jsonl", 1.0),
)
"""Two light rows, by file and rate: enough to exercise the whole path."""

SPEED_LABELS = ("slora a10g S2 n=200 R=2", "slora a100-80 S4 n=400 R=6")
"""Saturated runs that the simulator's speed is measured on."""

LATENCY_FLOOR = 1.0
"""Seconds. Mean first-token latencies below this are a prefill or two: compared as differences, not as ratios."""


@dataclass(frozen=True)
class Compared:
    """A published row and our figures for it. fitted: the efficiencies were fitted to this run."""

    row: PaperRow
    ours: SimulatedRow
    fitted: bool

    def relative(self, figure: str) -> float:
        return float(getattr(self.ours, figure) / getattr(self.row, figure) - 1)

    def difference(self, figure: str) -> float:
        return float(getattr(self.ours, figure) - getattr(self.row, figure))


def compare(rows: Sequence[PaperRow], all_rows: Sequence[PaperRow], workers: int) -> list[Compared]:
    """Simulates `rows` and pairs them with the published ones."""
    fitted = fitting_labels(all_rows)
    results = simulate_rows(rows, workers=workers)
    return [Compared(row, ours, row.label in fitted) for row, ours in zip(rows, results, strict=True)]


def errors(compared: Sequence[Compared]) -> dict[str, Any]:
    """Returns absolute errors over rows: median and 90th percentile. Throughput and latency relative; first-token
    latency relative where the published one is at least `LATENCY_FLOOR`, else in seconds; attainment as a
    difference."""
    slow = [c for c in compared if c.row.first_token_latency >= LATENCY_FLOOR]
    quick = [c for c in compared if c.row.first_token_latency < LATENCY_FLOOR]
    return {
        "rows": len(compared),
        "throughput": _spread(c.relative("throughput") for c in compared),
        "latency": _spread(c.relative("latency") for c in compared),
        "first_token_latency": _spread(c.relative("first_token_latency") for c in slow),
        "first_token_seconds_where_below_1_s": _spread(c.difference("first_token_latency") for c in quick),
        "attainment": _spread(c.difference("attainment") for c in compared),
    }


def errors_by_system(compared: Iterable[Compared]) -> dict[str, Any]:
    """Returns errors on held-out rows per system, and within a system per device. Real workloads, for which we have
    only a stand-in, are separate."""
    groups: dict[str, list[Compared]] = defaultdict(list)
    for c in compared:
        if not c.fitted:
            real = ", real workload (stand-in)" if c.row.workload == "real" else ""
            groups[c.row.system + real].append(c)
    return {
        system: errors(group)
        | {
            "by_device": {
                d: errors([c for c in group if c.row.device == d]) for d in sorted({c.row.device for c in group})
            }
        }
        for system, group in groups.items()
    }


def orders(made: Iterable[Collected], ours: dict[PaperRow, SimulatedRow]) -> dict[str, Any]:
    """Returns, per figure, the number of pairs of systems in the published order, and the other pairs."""
    report = {}
    for figure in made:
        checks = check_order(figure, lambda row, metric: getattr(ours[row], metric) if row in ours else None)
        wrong = violations(checks)
        report[figure.experiment.name] = {
            "title": figure.experiment.title,
            "pairs": len(checks),
            "right": len(checks) - len(wrong),
            "violations": [
                f"{w.panel}, {w.axis}={w.at:g}, {w.metric}: {w.systems[0]} {w.published[0]:.3g} and {w.systems[1]} "
                f"{w.published[1]:.3g} published, {w.reproduced[0]:.3g} and {w.reproduced[1]:.3g} simulated"
                for w in wrong
            ],
        }
    return report


def knees(rows: Iterable[PaperRow], ours: dict[PaperRow, SimulatedRow]) -> list[dict[str, Any]]:
    """Returns the published and the simulated knee of every sweep over the request rate."""
    report = []
    for sweep in rate_sweeps(rows):
        if not all(row in ours for row in sweep):
            continue
        rates = [row.rate for row in sweep]
        published = find_knee(rates, [row.first_token_latency for row in sweep])
        simulated = find_knee(rates, [ours[row].first_token_latency for row in sweep])
        error = knee_error(published, simulated)
        report.append(
            {
                "sweep": f"{sweep[0].system} {sweep[0].device} {sweep[0].setting} {sweep[0].workload}",
                "rates": rates,
                "published": asdict(published),
                "simulated": asdict(simulated),
                "error": None if error is None else round(error, 4),
                "within_tolerance": knees_agree(published, simulated, KNEE_TOLERANCE),
            }
        )
    return report


def speed(all_rows: Iterable[PaperRow]) -> dict[str, int]:
    """Returns virtual seconds per second of CPU time; wall time would depend on other processes."""
    ratios = {}
    for row in {row.label: row for row in all_rows if row.label in SPEED_LABELS}.values():
        start = time.thread_time()
        ours = simulate_row(row)
        ratios[row.label] = round(ours.simulated_seconds / (time.thread_time() - start))
    return ratios


def report(compared: Sequence[Compared], all_rows: Sequence[PaperRow]) -> dict[str, Any]:
    """Returns the content of `validation.json`."""
    ours = {c.row: c.ours for c in compared}
    rows = [c.row for c in compared]
    left_out = Counter((row.system, reason) for row in all_rows if (reason := exclusion(row)) is not None)
    slora = [c for c in compared if c.row.system == "slora" and c.row.workload == "synthetic" and not c.fitted]
    made_knees = knees(rows, ours)
    made_orders = orders(published_figures(), ours)
    made_speed = speed(all_rows)
    return {
        "command": "python -m experiments.simulator_validation",
        "goals": {
            "slora_throughput_median_error": {
                "goal": 0.10,
                "reached": _spread(c.relative("throughput") for c in slora)["median"],
            },
            "order_of_systems": {
                "goal": "all right",
                "reached": f"{sum(o['right'] for o in made_orders.values())} of "
                f"{sum(o['pairs'] for o in made_orders.values())} pairs",
            },
            "knees": {
                "goal": f"within {KNEE_TOLERANCE:.0%}",
                "reached": f"{sum(k['within_tolerance'] for k in made_knees)} of {len(made_knees)} sweeps",
            },
            "speed": {"goal": 200, "reached": min(made_speed.values())},
        },
        "held_out_errors": errors_by_system(compared),
        "fitted_rows": {c.row.label: _figures(c) for c in compared if c.fitted},
        "order": made_orders,
        "knees": made_knees,
        "virtual_seconds_per_cpu_second": made_speed,
        "left_out": [{"system": s, "reason": r, "rows": n} for (s, r), n in sorted(left_out.items())],
        "rows": [{"file": c.row.file, "label": c.row.label, "fitted": c.fitted} | _figures(c) for c in compared],
        "provenance": provenance(("numpy",)),
    }


def summary(content: dict[str, Any]) -> str:
    """Returns the report in a few lines."""
    lines = [f"{'held-out rows':34} {'rows':>5} {'throughput':>18} {'first token':>18} {'attainment':>18}"]
    for system, e in content["held_out_errors"].items():
        cells = [e[k] for k in ("throughput", "first_token_latency", "attainment")]
        texts = [f"{c['median']:7.1%} (p90 {c['p90']:.0%})" if c["count"] else "" for c in cells]
        lines.append(f"{system:34} {e['rows']:5} " + " ".join(f"{t:>18}" for t in texts))
    lines += [f"{name}: {o['right']} of {o['pairs']} pairs in order" for name, o in content["order"].items()]
    for knee in content["knees"]:
        both = [(knee[s]["rate"] and round(knee[s]["rate"], 2)) or knee[s]["side"] for s in ("published", "simulated")]
        lines.append(f"knee {knee['sweep']}: published {both[0]}, simulated {both[1]}, {knee['error']}")
    lines += [f"{name}: {g['reached']} (goal {g['goal']})" for name, g in content["goals"].items()]
    return "\n".join(lines)


def _spread(values: Iterable[float]) -> dict[str, Any]:
    """Returns median and 90th percentile of absolute values, and the mean of the signed ones as the bias."""
    array = np.fromiter(values, float)
    if not array.size:
        return {"count": 0, "median": None, "p90": None, "bias": None}
    median, p90 = np.percentile(np.abs(array), (50, 90)).tolist()
    return {
        "count": array.size,
        "median": round(median, 4),
        "p90": round(p90, 4),
        "bias": round(float(array.mean()), 4),
    }


def _figures(c: Compared) -> dict[str, Any]:
    names = ("throughput", "latency", "first_token_latency", "attainment", "satisfaction", "aborts")
    return {
        name: {"published": _rounded(getattr(c.row, name)), "simulated": _rounded(getattr(c.ours, name))}
        for name in names
    } | {"throughput_error": round(c.relative("throughput"), 4)}


def _rounded(value: float) -> float | None:
    return float(f"{value:.5g}") if math.isfinite(value) else None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=DEFAULT_OUTPUT, help="directory")
    parser.add_argument("--quick", action="store_true", help="two rows")
    parser.add_argument("--systems", nargs="*", help="only rows of these")
    parser.add_argument("--workers", type=int, default=1, help="processes")
    args = parser.parse_args()
    all_rows = load_rows()
    rows = [row for row in all_rows if exclusion(row) is None and (not args.systems or row.system in args.systems)]
    if args.quick:
        rows = [row for row in rows if (row.file, row.rate) in QUICK_ROWS]
    compared = compare(rows, all_rows, args.workers)
    content = report(compared, all_rows)
    print(summary(content))
    write_json(args.output / "validation.json", content)


if __name__ == "__main__":
    main()
