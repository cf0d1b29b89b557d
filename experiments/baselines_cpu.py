"""Every system that the paper compares, side by side on a CPU: `python -m experiments.baselines_cpu`.

One random Llama of about 100M parameters in float32, adapters of mixed ranks on q, k, v, o, one workload: requests that
all arrive at the start. What differs between the systems is in `experiments.systems.SYSTEMS`, and nothing else. Packed
takes the memory of the one engine for all its replicas.

Every round runs every system once, in turn, so that a noisy machine disturbs all alike. Written to a JSON file for each
system: throughput and first-token latency by round, its throughput over slora's within the same round (median over
rounds), and for how many requests its tokens are slora's. All systems are in memory at once: about 14 GiB.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from experiments import cpu_peft_comparison as model
from experiments.machine import provenance
from experiments.systems import SYSTEMS, OutOfMemory, System, SystemSettings, Workload, WorkloadRequest, make_system
from slora_jax import EngineConfig
from slora_jax.adapters import random_adapter, write_peft
from slora_jax.engine.sizing import adapter_geometry
from slora_jax.metrics import serving_metrics
from slora_jax.models import ModelConfig


@dataclass(frozen=True)
class Settings:
    """model: of `cpu_peft_comparison`, whose other fields are not used. ranks: of the adapters, in turn. requests:
    prompts of prompt_low..prompt_high tokens, with output_low..output_high new ones. systems: base settings of all.
    rounds: timed repetitions, after one that is not timed. seed: of the workload and the weights."""

    model: model.Settings
    systems: SystemSettings
    adapters: int = 4
    ranks: tuple[int, ...] = (8, 16, 32, 64)
    requests: int = 48
    prompt_low: int = 16
    prompt_high: int = 128
    output_low: int = 8
    output_high: int = 32
    rounds: int = 3
    seed: int = 0


FULL = Settings(
    model=model.Settings(),
    systems=SystemSettings(
        engine=EngineConfig(
            dtype="float32", num_pages=1400, max_num_seqs=32, max_num_batched_tokens=128, max_model_len=256,
            max_lora_rank=64,
            decode_buckets=(32,), mixed_buckets=(128,),
        ),
        peft_batch=16,
    ),
)  # fmt: skip

QUICK = Settings(
    model=model.QUICK,
    systems=SystemSettings(
        engine=EngineConfig(
            dtype="float32", num_pages=120, max_num_seqs=4, max_num_batched_tokens=16, max_model_len=96,
            max_lora_rank=8,
            decode_buckets=(4,), mixed_buckets=(16,), progress=False,
        ),
        peft_batch=2,
    ),
    adapters=3, ranks=(4, 8, 3), requests=8, prompt_low=2, prompt_high=40, output_low=1, output_high=12, rounds=1,
)  # fmt: skip
"""The same in a minute, to see that it runs; its numbers mean nothing."""


def workload(settings: Settings) -> list[WorkloadRequest]:
    """Requests evenly over the adapters, in random order."""
    rng = np.random.default_rng(settings.seed)
    names = rng.permutation(np.arange(settings.requests) % settings.adapters)
    return [
        WorkloadRequest(
            arrival=0.0,
            prompt=tuple(rng.integers(3, settings.model.vocab, prompt).tolist()),
            adapter=f"adapter-{name}",
            output=int(output),
        )
        for name, prompt, output in zip(
            names,
            rng.integers(settings.prompt_low, settings.prompt_high + 1, settings.requests),
            rng.integers(settings.output_low, settings.output_high + 1, settings.requests),
            strict=True,
        )
    ]


def write_model(settings: Settings, directory: Path) -> tuple[Path, dict[str, Path]]:
    """The checkpoint, and the adapters by name."""
    model.make_model(settings.model, directory / "model")
    config = ModelConfig.from_directory(directory / "model")
    geometry = adapter_geometry(config, settings.systems.engine.page_size)
    adapters = {}
    for i in range(settings.adapters):
        rank = settings.ranks[i % len(settings.ranks)]
        adapter = random_adapter(geometry, rank, model.TARGETS, seed=settings.seed + i)
        adapters[f"adapter-{i}"] = write_peft(directory / f"adapter-{i}", adapter)
    return directory / "model", adapters


def compare(settings: Settings, names: list[str], scratch: Path) -> dict[str, Any]:
    """Builds the systems, times them in turn, compares tokens with the first's, and returns results as JSON values."""
    model_dir, adapters = write_model(settings, scratch)
    load = workload(settings)
    with ExitStack() as stack:
        systems: dict[str, System] = {}
        failed: dict[str, str] = {}
        for name in tqdm(names, desc="preparing systems", unit="system"):
            try:
                systems[name] = stack.enter_context(make_system(name, model_dir, adapters, settings.systems))
            except OutOfMemory as error:
                failed[name] = str(error)
        tokens = {name: system.run_with_tokens(load).tokens for name, system in systems.items()}
        rounds: dict[str, list[dict[str, float]]] = {name: [] for name in systems}
        with tqdm(total=settings.rounds * len(systems), desc="timing", unit="run") as bar:
            for _ in range(settings.rounds):
                for name, system in systems.items():
                    bar.set_postfix_str(name)
                    rounds[name].append(measure(system, load))
                    bar.update()
    first = names[0]
    return {
        "settings": asdict(settings),
        "provenance": provenance(("jax", "jaxlib", "flax", "numpy", "torch", "transformers", "peft")),
        "changes": {name: SYSTEMS[name] for name in names},
        "out_of_memory": failed,
        "rounds": rounds,
        "median": {name: _medians(values) for name, values in rounds.items()},
        f"throughput_over_{first}": {name: _ratio(rounds[name], rounds[first]) for name in rounds},
        f"requests_with_the_tokens_of_{first}": {
            name: f"{sum(a == b for a, b in zip(own, tokens[first], strict=True))} of {len(load)}"
            for name, own in tokens.items()
        },
    }


def measure(system: System, load: Workload) -> dict[str, float]:
    """Requests and output tokens per second of wall time, and seconds to the first token (mean and 90th percentile)."""
    metrics = serving_metrics(system.run(load))
    first = metrics.first_token_latency
    return {
        "throughput": round(metrics.throughput, 4),
        "token_throughput": round(metrics.token_throughput, 2),
        "first_token_mean": round(first.mean, 4),
        "first_token_p90": round(first.p90, 4),
    }


def _medians(rounds: list[dict[str, float]]) -> dict[str, float]:
    return {name: statistics.median(values[name] for values in rounds) for name in rounds[0]}


def _ratio(rounds: list[dict[str, float]], over: list[dict[str, float]]) -> float:
    return round(statistics.median(a["throughput"] / b["throughput"] for a, b in zip(rounds, over, strict=True)), 3)


def _print(results: dict[str, Any]) -> None:
    over = next(key for key in results if key.startswith("throughput_over_"))
    same = next(key for key in results if key.startswith("requests_with_"))
    print(f"{'system':14s} {'requests/s':>10s} {'over ' + over[16:]:>11s} {'first token s':>14s}  same tokens")
    for name, median in results["median"].items():
        figures = f"{median['throughput']:10.3f} {results[over][name]:11.3f} {median['first_token_mean']:14.3f}"
        print(f"{name:14s} {figures}  {results[same][name]}")
    for name, error in results["out_of_memory"].items():
        print(f"{name:14s} {error}")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="a toy model, in a minute; its numbers mean nothing")
    parser.add_argument("--systems", nargs="+", default=list(SYSTEMS), choices=list(SYSTEMS), metavar="SYSTEM")
    parser.add_argument("--rounds", type=int, help="timed repetitions of every system")
    parser.add_argument("--note", default="", help="what to know about the machine during the run; kept in the file")
    parser.add_argument("--output", type=Path, default=Path("experiments/results/baselines_cpu.json"))
    args = parser.parse_args()
    settings = QUICK if args.quick else FULL
    if args.rounds:
        settings = replace(settings, rounds=args.rounds)
    with tempfile.TemporaryDirectory() as scratch:
        results = {"note": args.note} | compare(settings, args.systems, Path(scratch))
    _print(results)
    if not args.quick:
        args.output.parent.mkdir(parents=True, exist_ok=True)
        args.output.write_text(json.dumps(results, indent=2, default=str) + "\n")
        print(f"written to {args.output}")


if __name__ == "__main__":
    main()
