"""Fits the simulator's efficiencies of the paper's devices to a few runs: `python -m experiments.simulator_fit`.

Which runs, and which efficiencies they decide, is data (`STAGES`), chosen before any other run was simulated: for each
device one run of the base model at saturation, one at light load (which shows the launches), the extremes of the
adapters' cost, and per baseline the one or two runs that show its own overhead. All other runs test the result
(`experiments.simulator_validation`). H100 and H200 were not measured by the paper, so they have no fit.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from scipy.optimize import least_squares

import slora_jax.simulation
from experiments.paper import PaperRow, load_rows
from experiments.paper.exclusions import exclusion
from experiments.simulated_rows import SimulatedRow, simulate_rows
from slora_jax.simulation import DeviceModel, load_device

DEVICE_FILES = Path(slora_jax.simulation.__file__).parent / "devices"

WEIGHTS = {"throughput": 1.0, "latency": 0.3, "first_token_latency": 0.1}
"""How much a relative error counts. Latencies of a saturated run are the difference of two large times."""


@dataclass(frozen=True)
class Parameter:
    """An efficiency and the range that makes sense for it."""

    name: str
    low: float
    high: float


SHARES = (
    Parameter("matmul", 0.2, 0.95),
    Parameter("bandwidth", 0.4, 1.0),
    Parameter("attention", 0.1, 1.0),
    Parameter("prefill_attention", 0.05, 0.95),
    Parameter("lora", 0.05, 1.0),
    Parameter("lora_flops", 0.01, 0.5),
)
LAUNCHES = (Parameter("layer_seconds", 1e-4, 4e-3), Parameter("lora_layer_seconds", 1e-5, 2e-3))
HOST = (Parameter("host_sequence_seconds", 1e-6, 1e-3), Parameter("adapter_load_seconds", 1e-4, 5e-2))
BMM = (Parameter("launch_seconds", 5e-6, 5e-4), Parameter("allocation_seconds", 1e-3, 0.5))


@dataclass(frozen=True)
class Stage:
    """Efficiencies of one software on one device, fitted together. rows: (file, number of adapters, request rate).
    like: the device whose values of this software are taken over before the fit."""

    device: str
    software: str
    parameters: tuple[Parameter, ...]
    rows: tuple[tuple[str, int, float], ...]
    like: str | None = None


_SYNTHETIC = "synthetic/{0}/synthetic_{1}_{2}_{0}.jsonl"


def _run(system: str, axis: str, place: str, adapters: int, rate: float) -> tuple[str, int, float]:
    return _SYNTHETIC.format(system, axis, place), adapters, rate


STAGES = (
    Stage(
        "a10g",
        "pytorch",
        (*SHARES, *LAUNCHES, *HOST),
        (
            ("ablation_mem/ablation_mem_a10g_S1_dm.jsonl", 0, 2.5),
            _run("slora", "req_rate", "a10g_S1", 200, 1),
            _run("slora", "req_rate", "a10g_S1", 200, 2.5),
            _run("slora", "req_rate", "a10g_S2", 200, 1),
            _run("slora", "num_adapters", "a10g_S2", 1, 2),
            _run("slora", "num_adapters", "a10g_S2", 200, 2),
        ),
    ),
    Stage(
        "a10g",
        "pytorch",
        BMM,
        (_run("bmm", "num_adapters", "a10g_S2", 1, 2), _run("bmm", "num_adapters", "a10g_S2", 200, 2)),
    ),
    Stage(
        "a100-80",
        "pytorch",
        (*SHARES, *LAUNCHES, *HOST),
        (
            _run("slora", "num_adapters", "a100-80_S4", 0, 6),
            _run("slora", "req_rate", "a100-80_S4", 400, 2),
            _run("slora", "num_adapters", "a100-80_S4", 400, 6),
            _run("slora", "num_adapters", "a100-80_S2", 0, 10),
            _run("slora", "num_adapters", "a100-80_S2", 1, 10),
            _run("slora", "num_adapters", "a100-80_S2", 200, 10),
        ),
    ),
    Stage(
        "a100-80",
        "pytorch",
        BMM,
        (_run("bmm", "num_adapters", "a100-80_S4", 1, 6), _run("bmm", "num_adapters", "a100-80_S4", 100, 6)),
    ),
    Stage(
        "a100-40",
        "pytorch",
        (LAUNCHES[0], HOST[0]),
        (
            _run("slora", "num_adapters", "a100-40_S4", 0, 2),
            _run("slora", "num_adapters", "a100-40_S4", 200, 2),
        ),
        like="a100-80",
    ),
    Stage("a100-40", "pytorch", BMM[:1], (_run("bmm", "num_adapters", "a100-40_S4", 20, 2),)),
)


def fitting_labels(rows: Iterable[PaperRow]) -> set[str]:
    """Labels of the rows used for fitting. Other measurements of the same run bear the same label: they are no test."""
    chosen = {run for stage in STAGES for run in stage.rows}
    return {row.label for row in rows if (row.file, row.num_adapters, row.rate) in chosen}


def stage_rows(stage: Stage, rows: Iterable[PaperRow]) -> list[PaperRow]:
    """The stage's rows, in its order.

    Raises:
      ValueError: one is not there, or not alone.
    """
    used = [row for row in rows if exclusion(row) is None]
    chosen = []
    for file, adapters, rate in stage.rows:
        found = [r for r in used if (r.file, r.num_adapters, r.rate) == (file, adapters, rate)]
        if len(found) != 1:
            raise ValueError(f"{file}, n={adapters}, R={rate}: {len(found)} rows; a fitting row must be one")
        chosen += found
    return chosen


@dataclass(frozen=True)
class Fit:
    """values: of the stage's parameters. errors: relative, ours against the published, per row's label and figure."""

    values: Mapping[str, float]
    errors: Mapping[str, Mapping[str, float]] = field(default_factory=dict)


def fit(stage: Stage, rows: Sequence[PaperRow], device: DeviceModel, workers: int) -> Fit:
    """Least squares of the logarithms' differences, on the logarithms of the parameters, from the device's values."""
    start = device.efficiency[stage.software]
    low = np.log([p.low for p in stage.parameters])
    high = np.log([p.high for p in stage.parameters])
    first = np.clip([math.log(max(getattr(start, p.name), p.low)) for p in stage.parameters], low + 1e-3, high - 1e-3)

    def values(logs: np.ndarray) -> dict[str, float]:
        return {p.name: float(np.exp(x)) for p, x in zip(stage.parameters, logs, strict=True)}

    def simulated(logs: np.ndarray) -> list[SimulatedRow]:
        changed = device.fitted(stage.software, **values(logs))
        return simulate_rows(rows, {stage.device: changed}, workers)

    def residuals(logs: np.ndarray) -> np.ndarray:
        ours = simulated(logs)
        return 10 * np.array(
            [
                weight * math.log(getattr(our, figure) / getattr(row, figure))
                for row, our in zip(rows, ours, strict=True)
                for figure, weight in WEIGHTS.items()
            ]
        )

    best = least_squares(residuals, first, bounds=(low, high), diff_step=0.02, x_scale=0.3, loss="soft_l1", max_nfev=12)
    errors = {
        row.label: {figure: getattr(our, figure) / getattr(row, figure) - 1 for figure in WEIGHTS}
        for row, our in zip(rows, simulated(best.x), strict=True)
    }
    return Fit(values(best.x), errors)


def write(stage: Stage, result: Fit, file: Path) -> None:
    """Puts the fit into a device's file, with the runs it was fitted to."""
    content: dict[str, Any] = json.loads(file.read_text())
    content["efficiency"][stage.software].update({name: float(f"{x:.4g}") for name, x in result.values.items()})
    notes = content.setdefault("fit", {})
    notes.setdefault(stage.software, {}).update(
        {name: f"fitted to {'; '.join(result.errors)}" for name in sorted(result.values)}
    )
    file.write_text(json.dumps(content, indent=1) + "\n")


def take_over(stage: Stage) -> None:
    """Copies the efficiencies of the device that this one is like."""
    if stage.like is None:
        return
    file = DEVICE_FILES / f"{stage.device}.json"
    content = json.loads(file.read_text())
    like = json.loads((DEVICE_FILES / f"{stage.like}.json").read_text())
    content["efficiency"][stage.software] = like["efficiency"][stage.software]
    note = f"as {stage.like}: the same chip"
    content.setdefault("fit", {})[stage.software] = {name: note for name in like["efficiency"][stage.software]}
    file.write_text(json.dumps(content, indent=1) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--devices", nargs="*", default=sorted({s.device for s in STAGES}), help="only these")
    parser.add_argument("--stages", nargs="*", type=int, default=range(len(STAGES)), help="only these, by number")
    parser.add_argument("--workers", type=int, default=2, help="processes")
    args = parser.parse_args()
    rows = load_rows()
    for number in args.stages:
        stage = STAGES[number]
        if stage.device not in args.devices:
            continue
        take_over(stage)
        result = fit(stage, stage_rows(stage, rows), load_device(stage.device), args.workers)
        write(stage, result, DEVICE_FILES / f"{stage.device}.json")
        print(f"{number} {stage.device} {stage.software}:", {k: float(f"{v:.4g}") for k, v in result.values.items()})
        for label, errors in result.errors.items():
            print(f"  {label:44}", ", ".join(f"{figure} {error:+.1%}" for figure, error in errors.items()), flush=True)


if __name__ == "__main__":
    main()
