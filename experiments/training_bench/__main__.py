"""Training of many adapters, side by side: `python -m experiments.training_bench`.

Our trainer, PEFT with torch's AdamW one adapter after another, and padded stacks in JAX train the same adapters on the
same tokens, in float32. Each system has a process of its own for each cell, so its peak memory is its own; while one
runs, the others wait. A step is forward, backward and optimizer. The systems' losses must agree in every step.
"""

from __future__ import annotations

import argparse
import json
import signal
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from tqdm import tqdm

from experiments.config.schema import MODELS
from experiments.machine import provenance, write_json
from experiments.rounds import turns
from experiments.systems.peft import write_random_checkpoint
from experiments.training_bench.settings import CELLS, QUICK, Cell, rank_of
from experiments.vllm_comparison.worker import Worker, running
from slora_jax.adapters import LoraConfig, write_peft
from slora_jax.engine.sizing import adapter_geometry
from slora_jax.models import ModelConfig
from slora_jax.training.pool import initial_adapter

TOLERANCE = 1e-3
"""Largest relative difference between two systems' losses of an adapter."""


def main(argv: Sequence[str] | None = None) -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", type=Path, help="a Hugging Face directory (default: random, SmolLM2-135M's shape)")
    parser.add_argument("--rounds", type=int, default=3, help="timed rounds of a cell at most (default: %(default)s)")
    parser.add_argument("--quick", action="store_true", help="a toy model, in seconds; its numbers mean nothing")
    parser.add_argument(
        "--only", default="", metavar="TEXT", help="only cells with this in the name; others stay as they are"
    )
    parser.add_argument("--output", type=Path, default=Path("experiments/results/training.json"))
    args = parser.parse_args(argv)
    if args.rounds < 1:
        parser.error(f"--rounds {args.rounds}: must be 1 or more")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # ends the workers, as Ctrl-C does
    shape = "micro-llama" if args.quick else "smollm2-135m"
    cells = [replace(cell, rounds=min(cell.rounds, args.rounds)) for cell in (QUICK if args.quick else CELLS)]
    chosen = [cell for cell in cells if args.only in cell.name]
    if not chosen:
        parser.error(f"--only {args.only!r}: no cell has this in its name; cells: {', '.join(c.name for c in cells)}")
    with tempfile.TemporaryDirectory() as scratch:
        model = args.model or write_random_checkpoint(MODELS / f"{shape}.json", Path(scratch) / "model", seed=0)
        adapters = write_adapters(model, max(cell.adapters for cell in chosen), Path(scratch))
        described = args.model.name if args.model else f"random, {shape}"
        packages = ("jax", "jaxlib", "optax", "numpy", "torch", "peft", "transformers")
        before = json.loads(args.output.read_text()) if args.only and args.output.exists() else {}
        kept = before["cells"] if before.get("model") == described else []
        results: dict[str, dict[str, Any]] = {one["name"]: one for one in kept}
        for cell in chosen:  # each result is kept if a later cell is interrupted
            results[cell.name] = measure(cell, model, adapters, Path(scratch)) | {"provenance": provenance(packages)}
            print(table([results[cell.name]]))
            write_json(args.output, {"model": described, "cells": list(results.values())})


def write_adapters(model: Path, count: int, scratch: Path) -> list[str]:
    """Writes PEFT directories of new adapters on all linear layers."""
    geometry, paths = adapter_geometry(ModelConfig.from_directory(model), 16), []
    for i in tqdm(range(count), desc="adapters"):
        config = LoraConfig(r=rank_of(i), lora_alpha=2 * rank_of(i), target_modules="all-linear")
        paths.append(str(write_peft(scratch / f"adapter-{i}", initial_adapter(config, geometry, seed=i))))
    return paths


def measure(cell: Cell, model: Path, adapters: Sequence[str], scratch: Path) -> dict[str, Any]:
    """Runs a cell. Returns JSON values. Raises RuntimeError if a worker ends, or if the losses differ."""
    steps: dict[str, list[dict[str, Any]]] = {name: [] for name in cell.systems}
    starts = {}
    with ExitStack() as stack:
        workers: dict[str, Worker] = {}
        for name in tqdm(cell.systems, desc=f"{cell.name}: start"):
            settings = {
                "system": name, "model": str(Path(model).resolve()), "adapters": adapters[: cell.adapters],
                "cell": asdict(cell),
            }  # fmt: skip
            log, begin = scratch / f"{name}.log", time.perf_counter()
            environment = {"JAX_PLATFORMS": "cpu", "HF_HUB_OFFLINE": "1", "JAX_ENABLE_COMPILATION_CACHE": "false"}
            worker = running(Path(sys.executable), "experiments.training_bench.worker", settings, log, environment)
            workers[name] = stack.enter_context(worker)
            starts[name] = round(time.perf_counter() - begin, 1)
        for title, count, members in (
            (f"{cell.name}: warm-up", cell.warm_up, cell.warm_up_adapters), (cell.name, cell.rounds, cell.adapters),
        ):  # fmt: skip
            before = len(steps[cell.systems[0]])
            for number, name in turns(list(cell.systems), count, title, warm_up=False):
                steps[name].append(workers[name].ask({"step": before + number, "adapters": members}))
            difference = largest_difference(steps)
            if not difference <= TOLERANCE:
                raise RuntimeError(f"{title}: losses differ by {difference:.1e} of themselves, at most {TOLERANCE}")
    systems = {name: _system(cell, steps[name], starts[name]) for name in cell.systems}
    ours = systems["slora-jax"]["tokens_per_second"]["rounds"]
    for name in cell.systems[1:]:
        pairs = [a / b for a, b in zip(ours, systems[name]["tokens_per_second"]["rounds"], strict=True)]
        systems[name]["slora_jax_over_it"] = {
            "median_of_pairs": round(statistics.median(pairs), 3), "pairs": [round(pair, 3) for pair in pairs]
        }  # fmt: skip
    return asdict(cell) | {"tokens": cell.tokens, "largest_loss_difference": difference, "results": systems}


def largest_difference(steps: dict[str, list[dict[str, Any]]]) -> float:
    """The largest relative difference between our losses and another system's, over all steps; NaN if one is."""
    ours, *others = steps.values()
    found = [
        abs(a - b) / abs(a)
        for other in others
        for own, its in zip(ours, other, strict=True)
        for a, b in zip(own["losses"], its["losses"], strict=True)
    ]
    return max(found, key=lambda value: (value != value, value))


def _system(cell: Cell, steps: Sequence[dict[str, Any]], start: float) -> dict[str, Any]:
    timed = steps[cell.warm_up :]
    rates = [cell.tokens / step["seconds"] for step in timed]
    return {
        "tokens_per_second": {"median": round(statistics.median(rates), 1), "rounds": [round(x, 1) for x in rates]},
        "seconds": [round(step["seconds"], 3) for step in timed],
        "cpu_seconds": [round(step["cpu_seconds"], 3) for step in timed],
        "peak_mib": round(steps[-1]["peak_mib"]),
        "start_seconds": start,
        "first_step_seconds": round(steps[0]["seconds"], 2),  # of `warm_up_adapters`, with compilation
    }


def table(cells: Sequence[dict[str, Any]]) -> str:
    """The results for a terminal."""
    lines = [f"{'':22} {'system':12} {'tokens/s':>9} {'ours over it':>13} {'peak MiB':>9} {'first step':>11}"]
    for cell in cells:
        for name, one in cell["results"].items():
            ratio = one.get("slora_jax_over_it", {}).get("median_of_pairs", "")
            lines.append(
                f"{cell['name']:22} {name:12} {one['tokens_per_second']['median']:9.1f} {ratio!s:>13} "
                f"{one['peak_mib']:9} {one['first_step_seconds']:9.1f} s"
            )
    return "\n".join(lines)


if __name__ == "__main__":
    main()
