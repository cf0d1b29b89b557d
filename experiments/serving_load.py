"""`slora serve` under a public load tester, side by side with the engine alone: `python -m experiments.serving_load`.

One random Llama in float32, hundreds of PEFT adapters of mixed ranks and modules, one list of requests (adapters by
Zipf's law, half of the requests greedy and half sampled with seeds). In turn, each in fresh processes:

- the engine alone, in a closed loop: 64 requests unfinished at a time;
- `slora serve`, and locust with 64 users that stream their answers.

Both have the same settings, the same warm-up and the same requests in the same order; goodput is the generated tokens
of correctly answered requests by the time from the first request to the last answer. The clients take their CPU time
from the same cores as the server. What else the machine does disturbs a round, so each says what share of the CPU
others had; the ratio of the CPU times of a token (`cpu_ratio`) suffers less from them. At the end locust keeps a server
busy for minutes, while its memory, file handles, threads and pool pages are watched.
"""

from __future__ import annotations

import argparse
import json
import shutil
import signal
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from subprocess import Popen
from typing import Any

import numpy as np
import psutil
from tqdm import tqdm

from experiments.machine import provenance
from experiments.serving.answers import Answers, different_tokens
from experiments.serving.processes import Server, child, clients, finish, serving
from experiments.serving.soak import IN_USE, WATCHED, Watch, growth
from experiments.serving.traffic import Traffic, make_requests, write_requests
from slora_jax.adapters import random_adapter, write_peft
from slora_jax.demo.adapters import TARGETS
from slora_jax.demo.checkpoint import Widths, write_checkpoint
from slora_jax.engine.sizing import adapter_geometry
from slora_jax.models import ModelConfig

RESULT = Path("experiments/results/serving_load.json")
IDLE_SECONDS = 5.0
"""After the last answer of the soak, for what is looked at every second to be seen."""
GOAL = 0.9
"""Of the goodput of the engine alone."""


@dataclass(frozen=True)
class Settings:
    """layers, widths: of the model. adapters: of `ranks` in turn, each with two, four or seven modules of a layer.
    engine: settings as in a config file. users: requests unfinished at a time. warm_up: requests before the timed ones.
    soak_seconds: 0 leaves it out."""

    layers: int
    widths: Widths
    adapters: int
    ranks: tuple[int, ...]
    traffic: Traffic
    engine: dict[str, Any]
    users: int = 64
    warm_up: int = 64
    rounds: int = 3
    soak_seconds: float = 240.0
    seed: int = 0


FULL = Settings(
    layers=8,
    widths=Widths(hidden=512, heads=8, kv_heads=8, ffn=1376),
    adapters=500,
    ranks=(4, 8, 16, 32),
    traffic=Traffic(requests=384, prompt_low=16, prompt_high=128, output_low=16, output_high=112),
    engine={"dtype": "float32", "num_pages": 1600, "max_num_seqs": 64, "max_num_batched_tokens": 256,
            "max_model_len": 256,
            "max_lora_rank": 32, "decode_buckets": [64], "mixed_buckets": [256]},
)  # fmt: skip

QUICK = Settings(
    layers=1, widths=Widths(hidden=64, heads=4, kv_heads=2, ffn=96), adapters=12, ranks=(2, 4, 8),
    traffic=Traffic(requests=48, prompt_low=2, prompt_high=24, output_low=2, output_high=12),
    engine={"dtype": "float32", "num_pages": 200, "page_size": 8, "max_num_seqs": 8, "max_num_batched_tokens": 32,
            "max_model_len": 64, "max_lora_rank": 8, "decode_buckets": [8], "mixed_buckets": [32], "progress": False},
    users=8, warm_up=16, rounds=1, soak_seconds=3.0,
)  # fmt: skip
"""The same in seconds, to see that it runs; its numbers mean nothing."""


COUNTED = {
    "steps": "engine_steps",
    "tokens_generated": "generated_tokens",
    "adapter_loads": "adapter_loads",
    "adapter_evictions": "adapter_evictions",
    "preemptions": "preemptions",
}
"""Fields of `EngineStats`, and the server's names for them."""


@dataclass(frozen=True)
class Counters:
    """Of an engine, the warm-up included."""

    steps: float
    tokens: float
    adapter_loads: float
    adapter_evictions: float
    preemptions: float


class Bench:
    """The files that both sides read, and the two sides."""

    def __init__(self, settings: Settings, directory: Path) -> None:
        self.settings, self.directory = settings, directory
        self.model, self.adapters, self.config = (directory / name for name in ("model", "adapters", "config.json"))
        self._answers, self._log = directory / "answers.json", directory / "server.log"

    def prepare(self) -> None:
        """Writes the model, the adapters, the settings and the requests, unless this directory has them."""
        settings, made = self.settings, self.directory / "made.json"
        content = (settings.layers, asdict(settings.widths), settings.adapters, settings.ranks, settings.seed)
        if not made.exists() or made.read_text() != json.dumps(content):
            for old in (self.model, self.adapters):
                shutil.rmtree(old, ignore_errors=True)
            write_checkpoint(self.model, settings.layers, settings.seed, settings.widths)
            geometry = adapter_geometry(ModelConfig.from_directory(self.model), settings.engine.get("page_size", 16))
            for i in tqdm(range(settings.adapters), desc="writing adapters", unit="adapter"):
                rank, targets = (
                    settings.ranks[i % len(settings.ranks)],
                    TARGETS[i // len(settings.ranks) % len(TARGETS)],
                )
                adapter = random_adapter(geometry, rank, targets, seed=settings.seed + i)
                write_peft(self.adapters / f"adapter-{i:04d}", adapter, dtype="float16")
            made.write_text(json.dumps(content))
        cache = {"compilation_cache_dir": str(self.directory / "compiled")}
        self.config.write_text(json.dumps({"engine": cache | settings.engine}))
        vocab = ModelConfig.from_directory(self.model).vocab_size
        names = sorted(path.name for path in self.adapters.iterdir() if path.is_dir())
        warm_up = replace(settings.traffic, requests=settings.warm_up)
        for traffic, name, seed in (
            (warm_up, "warm_up", settings.seed + 1),
            (settings.traffic, "requests", settings.seed),
        ):
            write_requests(self._file(name), make_requests(traffic, names, vocab, seed))

    def alone(self) -> tuple[Answers, Counters]:
        """The engine's answers to all requests."""
        stats = self.directory / "stats.json"
        files = (self.model, self.adapters, self.config, self._file("warm_up"), self._file("requests"))
        command = [sys.executable, "-m", "experiments.serving.offline", *map(str, (*files, self._answers, stats))]
        with child([*command, "--users", str(self.settings.users)]) as process:
            finish(process, "the engine alone")
        counted = json.loads(stats.read_text())
        return self._take_answers(), Counters(*(counted[name] for name in COUNTED))

    def served(self) -> tuple[Answers, Counters]:
        """What the clients of a server got."""
        with self._serving() as server:
            with self._locust(server) as locust:
                finish(locust, "locust")
            time.sleep(IDLE_SECONDS)
            counted = server.metrics()
            server.stop()
        return self._take_answers(), Counters(*(counted[f"slora_{name}_total"][()] for name in COUNTED.values()))

    def soak(self) -> tuple[Answers, Watch, dict[str, int]]:
        """What the clients of a server got in minutes, the server meanwhile, and its pool after them."""
        with self._serving() as server:
            watch = Watch(server)
            with self._locust(server, self.settings.soak_seconds) as locust:
                watch.run(lambda: locust.poll() is not None)
                finish(locust, "locust")
            time.sleep(IDLE_SECONDS)
            pages = watch.sample().pages
            server.stop()
        return self._take_answers(), watch, pages

    def _serving(self) -> AbstractContextManager[Server]:
        arguments = [str(self.model), "--adapters", str(self.adapters), "--config", str(self.config)]
        return serving(arguments, self._log)

    def _locust(self, server: Server, for_seconds: float = 0.0) -> AbstractContextManager[Popen]:
        files = (self._file("warm_up"), self._file("requests"), self._answers)
        return clients(server.url, server.pid, self.settings.users, *files, for_seconds)

    def _take_answers(self) -> Answers:
        found = Answers.read(self._answers)
        self._answers.unlink()
        return found

    def _file(self, name: str) -> Path:
        return self.directory / f"{name}.jsonl"


def compare(settings: Settings, directory: Path) -> dict[str, Any]:
    """Runs everything and returns the results as JSON values."""
    bench = Bench(settings, directory)
    bench.prepare()
    rounds = []
    for number in tqdm(range(settings.rounds), desc="rounds", unit="round"):
        sides = {}
        for side in ("alone", "served") if number % 2 == 0 else ("served", "alone"):
            sides[side] = bench.alone() if side == "alone" else bench.served()
        rounds.append(_round(*sides["alone"], *sides["served"]))
    results = {
        "command": "python -m experiments.serving_load",
        "settings": asdict(settings),
        "provenance": provenance(("jax", "jaxlib", "numpy", "fastapi", "uvicorn", "uvloop", "httptools", "locust")),
        "median": _medians(rounds),
        "rounds": rounds,
    }
    if settings.soak_seconds:
        results["soak"] = _soak(*bench.soak(), settings)
    return results


def _round(alone: Answers, alone_counted: Counters, served: Answers, served_counted: Counters) -> dict[str, Any]:
    sides = {"alone": _side(alone, alone_counted), "served": _side(served, served_counted)}
    ours, theirs = (sides[side]["cpu_microseconds_per_token"] for side in ("alone", "served"))
    return sides | {
        "cpu_ratio": round(ours["engine_process"] / (theirs["engine_process"] + theirs["client"]), 4),
        "ratio": round(sides["served"]["goodput"] / sides["alone"]["goodput"], 4),
        "requests_with_different_tokens": different_tokens(alone, served),
    }


def _side(found: Answers, counted: Counters | None = None) -> dict[str, Any]:
    """Goodput in tokens per second; latencies in seconds as p50 and p99; CPU time as a share of that of all cores, and
    in microseconds a token. A step's tokens and seconds are means."""
    assert found.cpu is not None
    cpu, cores = found.cpu, len(psutil.Process().cpu_affinity())
    used = {
        "engine_process": cpu.engine,
        "of_it_main_thread": cpu.main_thread,
        "client": cpu.client,
        "others": cpu.machine - cpu.engine - cpu.client,
    }
    latencies = {
        "first_token": [answer.first_token for _, answer in found.answered],
        "last_token": [answer.last_token for _, answer in found.answered],
    }
    goodput = found.tokens / found.seconds
    side = {
        "goodput": round(goodput, 2),
        "seconds": round(found.seconds, 2),
        "requests": len(found.answered),
        "tokens": found.tokens,
        "failures": found.failures,
        "latency": {name: np.percentile(values, [50, 99]).round(4).tolist() for name, values in latencies.items()},
        "cpu_share": {name: round(seconds / found.seconds / cores, 4) for name, seconds in used.items()},
        "cpu_microseconds_per_token": {
            name: round(1e6 * seconds / found.tokens, 1) for name, seconds in used.items() if name != "others"
        },
    }
    if counted is None:
        return side
    per_step = counted.tokens / counted.steps
    return side | {
        "tokens_per_step": round(per_step, 2),
        "seconds_per_step": round(per_step / goodput, 5),
        "counters_with_warm_up": asdict(counted),
    }


def _medians(rounds: list[dict[str, Any]]) -> dict[str, float]:
    """Also what the server and its clients cost beside the engine, in microseconds of CPU time a token."""

    def median(value: Callable[[dict[str, Any]], float]) -> float:
        return round(statistics.median(map(value, rounds)), 4)

    def cpu(side: str, name: str) -> float:
        return median(lambda one: one[side]["cpu_microseconds_per_token"][name])

    return {
        "goodput_alone": median(lambda one: one["alone"]["goodput"]),
        "goodput_served": median(lambda one: one["served"]["goodput"]),
        "ratio": median(lambda one: one["ratio"]),
        "cpu_ratio": median(lambda one: one["cpu_ratio"]),
        "event_loop_microseconds_per_token": cpu("served", "of_it_main_thread"),
        "client_microseconds_per_token": cpu("served", "client"),
        "server_process_over_engine_alone_microseconds_per_token": round(
            cpu("served", "engine_process") - cpu("alone", "engine_process"), 1
        ),
    }


def _soak(found: Answers, watch: Watch, idle: dict[str, int], settings: Settings) -> dict[str, Any]:
    held = {kind: idle[kind] for kind in IN_USE}
    every = max(1, len(watch.samples) // 60)
    return _side(found) | {
        "growth": growth(watch.samples),
        "pages_when_idle": idle,
        "pages_lost": settings.engine["num_pages"] - sum(idle.values()) + sum(held.values()),
        "samples": [asdict(sample) for sample in watch.samples[::every]],
    }


def _print(results: dict[str, Any]) -> None:
    print("\ngoodput (tokens/s)     alone    served     ratio cpu ratio   others' CPU   different tokens   failures")
    for number, one in enumerate(results["rounds"]):
        alone, served = one["alone"], one["served"]
        failures = len(alone["failures"]) + len(served["failures"])
        print(
            f"  round {number}         {alone['goodput']:9.1f} {served['goodput']:9.1f}"
            f" {one['ratio']:9.3f} {one['cpu_ratio']:9.3f}"
            f"   {alone['cpu_share']['others']:4.0%}, {served['cpu_share']['others']:4.0%}"
            f"   {len(one['requests_with_different_tokens']):16d} {failures:10d}"
        )
    median = results["median"]
    print(
        f"  median          {median['goodput_alone']:9.1f} {median['goodput_served']:9.1f}"
        f" {median['ratio']:9.3f} {median['cpu_ratio']:9.3f}   (goal: {GOAL})"
    )
    last = results["rounds"][-1]
    for side in ("alone", "served"):
        print(f"CPU, {side} (last round): {last[side]['cpu_share']} of all cores")
    print("CPU microseconds a token:", {name: value for name, value in median.items() if "microseconds" in name})
    if (soak := results.get("soak")) is not None:
        print(f"soak: {soak['requests']} requests in {soak['seconds']:.0f} s, {len(soak['failures'])} failures")
        for name in WATCHED:
            print(f"  {name}: {soak['growth'][name]}")
        print(f"  pool pages lost: {soak['pages_lost']}; when idle: {soak['pages_when_idle']}")


def problems(results: dict[str, Any]) -> list[str]:
    """What a result should not have."""
    found = []
    for number, one in enumerate(results["rounds"]):
        for side in ("alone", "served"):
            found += [f"round {number}, {side}: {failure}" for failure in one[side]["failures"]]
        if different := one["requests_with_different_tokens"]:
            found.append(f"round {number}: different tokens to requests {different}")
    if (soak := results.get("soak")) is not None:
        found += [f"soak: {failure}" for failure in soak["failures"]]
        if soak["pages_lost"]:
            found.append(f"soak: {soak['pages_lost']} pages are not free or idle at the end")
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="a toy model, in a minute; its numbers mean nothing")
    parser.add_argument("--rounds", type=int, help="timed repetitions of both sides")
    parser.add_argument("--requests", type=int, help="of a round")
    parser.add_argument("--soak-seconds", type=float, help="0: none")
    parser.add_argument("--dir", type=Path, help="keeps model and adapters for the next time (about 2 GB)")
    parser.add_argument("--output", type=Path, default=RESULT)
    args = parser.parse_args()
    settings = QUICK if args.quick else FULL
    given = {name: getattr(args, name) for name in ("rounds", "soak_seconds") if getattr(args, name) is not None}
    settings = replace(settings, **given)
    if args.requests:
        settings = replace(settings, traffic=replace(settings.traffic, requests=args.requests))
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # children are ended then, as by Ctrl-C
    with tempfile.TemporaryDirectory() as scratch:
        results = compare(settings, args.dir or Path(scratch))
    _print(results)
    if not args.quick:
        args.output.parent.mkdir(parents=True, exist_ok=True)
        args.output.write_text(json.dumps(results, indent=1) + "\n")
        print(f"written to {args.output}")
    for problem in problems(results):
        print(f"serving_load: {problem}", file=sys.stderr)
    return 1 if problems(results) else 0


if __name__ == "__main__":
    sys.exit(main())
