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
"""Weights of relative errors. Latencies of a saturated run are the difference of two large times."""


@dataclass(frozen=True)
class Parameter:
    """An efficiency and its plausible range."""

    name: str
    low: float
    high: float


SERVING = (
    Parameter("matmul", 0.2, 0.95),
    Parameter("bandwidth", 0.4, 1.0),
    Parameter("attention", 0.1, 1.0),
    Parameter("lora", 0.05, 1.0),
    Parameter("lora_reread", 0.005, 1.0),
    Parameter("lora_flops", 0.01, 0.5),
    Parameter("layer_seconds", 1e-4, 4e-3),
    Parameter("host_sequence_seconds", 1e-6, 1e-3),
    Parameter("adapter_load_seconds", 1e-4, 5e-2),
)
BMM = (Parameter("launch_seconds", 5e-6, 5e-4), Parameter("allocation_seconds", 1e-3, 0.5))
PEFT_READING = (Parameter("bandwidth", 0.4, 1.0), Parameter("attention", 0.1, 1.0))
PEFT_LAUNCHING = (Parameter("layer_seconds", 1e-4, 5e-3),)

SERVING_FIXED = {
    "prefill_attention": 0.25,
    "lora_layer_seconds": 2.5e-4,
    "host_step_seconds": 2e-3,
    "host_to_device": 0.35,
}
"""Not identifiable from the means of a run, so set: the Triton kernel's share of the matrix units; eight more launches
a layer; the host's work in a step that is not per sequence; and 0.7 of PCIe, halved, as S-LoRA's loader copies every
layer twice (once for A and once for B)."""

PEFT_FIXED = {"layer_seconds": 5e-4, "lora_layer_seconds": 2e-4, "adapter_wrap_seconds": 0.2}
"""On the A10G reading hides the launches, and a new adapter is made within a second."""


@dataclass(frozen=True)
class Stage:
    """Efficiencies of one software on one device, fitted together.

    Attributes:
      rows: (file, number of adapters, request rate).
      fixed: efficiencies set before the fit.
      like: (device, software) whose values are copied before that.
    """

    device: str
    software: str
    parameters: tuple[Parameter, ...]
    rows: tuple[tuple[str, int, float], ...]
    fixed: Mapping[str, float] = field(default_factory=dict)
    like: tuple[str, str] | None = None


_SYNTHETIC = "synthetic/{0}/synthetic_{1}_{2}_{0}.jsonl"


def _run(system: str, axis: str, place: str, adapters: int, rate: float) -> tuple[str, int, float]:
    return _SYNTHETIC.format(system, axis, place), adapters, rate


STAGES = (
    Stage(
        "a10g",
        "pytorch",
        SERVING,
        (
            ("ablation_mem/ablation_mem_a10g_S1_dm.jsonl", 0, 2.5),
            _run("slora", "req_rate", "a10g_S1", 200, 1),
            _run("slora", "req_rate", "a10g_S1", 200, 2.5),
            _run("slora", "req_rate", "a10g_S2", 200, 1),
            _run("slora", "num_adapters", "a10g_S2", 1, 2),
            _run("slora", "num_adapters", "a10g_S2", 200, 2),
        ),
        SERVING_FIXED,
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
        SERVING,
        (
            _run("slora", "num_adapters", "a100-80_S4", 0, 6),
            _run("slora", "req_rate", "a100-80_S4", 400, 2),
            _run("slora", "num_adapters", "a100-80_S4", 400, 6),
            _run("slora", "num_adapters", "a100-80_S2", 0, 10),
            _run("slora", "num_adapters", "a100-80_S2", 1, 10),
            _run("slora", "num_adapters", "a100-80_S2", 200, 10),
        ),
        SERVING_FIXED,
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
        SERVING[6:8],
        (
            _run("slora", "num_adapters", "a100-40_S4", 0, 2),
            _run("slora", "num_adapters", "a100-40_S4", 200, 2),
        ),
        like=("a100-80", "pytorch"),
    ),
    Stage("a100-40", "pytorch", BMM[:1], (_run("bmm", "num_adapters", "a100-40_S4", 20, 2),)),
    Stage(
        "a10g",
        "peft",
        PEFT_READING,
        (
            ("peft/debug_peft_num_adapter_a10g_S1_peft.jsonl", 1, 2),
            ("peft/debug_peft_num_adapter_a10g_S1_peft.jsonl", 200, 2),
        ),
        PEFT_FIXED,
    ),
    Stage(
        "a100-80",
        "peft",
        PEFT_LAUNCHING,
        (("peft/num_adapter_a100-80_S1_peft_fig3.jsonl", 5, 10),),
        like=("a10g", "peft"),
    ),
    Stage("a100-80", "vllm", (), (), like=("a100-80", "pytorch")),
    Stage("a10g", "vllm", (), (), like=("a10g", "pytorch")),
)
"""In order: a later stage builds on the earlier ones of its device."""


def fitting_labels(rows: Iterable[PaperRow]) -> set[str]:
    """Returns the labels of the rows used for fitting. Other measurements of a run have its label, so they are not held
    out."""
    chosen = {run for stage in STAGES for run in stage.rows}
    return {row.label for row in rows if (row.file, row.num_adapters, row.rate) in chosen}


def stage_rows(stage: Stage, rows: Iterable[PaperRow]) -> list[PaperRow]:
    """Returns the stage's rows, in its order.

    Raises:
      ValueError: a row is missing, or there are several.
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
    """A fit. values: of the stage's parameters. errors: relative to the published values, by the row's label and
    figure."""

    values: Mapping[str, float]
    errors: Mapping[str, Mapping[str, float]] = field(default_factory=dict)


def fit(stage: Stage, rows: Sequence[PaperRow], device: DeviceModel, workers: int) -> Fit:
    """Fits by least squares of log differences over log parameters, starting from the device's values."""
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
    """Writes the fit into a device's file, with the fitted runs."""
    content: dict[str, Any] = json.loads(file.read_text())
    content["efficiency"][stage.software].update({name: float(f"{x:.4g}") for name, x in result.values.items()})
    content["fit"][stage.software][", ".join(result.values)] = f"fitted to {'; '.join(result.errors)}"
    file.write_text(json.dumps(content, indent=1) + "\n")


def prepare(stage: Stage) -> None:
    """Copies the efficiencies from which this stage starts, and sets the fixed ones."""
    file = DEVICE_FILES / f"{stage.device}.json"
    content = json.loads(file.read_text())
    notes = content.setdefault("fit", {}).setdefault(stage.software, {})
    if stage.like is not None:
        device, software = stage.like
        like = json.loads((DEVICE_FILES / f"{device}.json").read_text())["efficiency"][software]
        content["efficiency"][stage.software] = like
        notes.clear()
        notes["all that is not named below"] = f"as {software} on {device}"
    content["efficiency"][stage.software].update(stage.fixed)
    if stage.fixed:
        notes[", ".join(stage.fixed)] = "set, not fitted: see experiments/simulator_fit.py"
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
        prepare(stage)
        if not stage.parameters:
            continue
        result = fit(stage, stage_rows(stage, rows), load_device(stage.device), args.workers)
        write(stage, result, DEVICE_FILES / f"{stage.device}.json")
        print(f"{number} {stage.device} {stage.software}:", {k: float(f"{v:.4g}") for k, v in result.values.items()})
        for label, errors in result.errors.items():
            print(f"  {label:44}", ", ".join(f"{figure} {error:+.1%}" for figure, error in errors.items()), flush=True)


if __name__ == "__main__":
    main()
