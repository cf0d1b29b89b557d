"""`slora serve` under a public load tester, beside the engine alone: runs of mode "load_test".

A random Llama or a model with weights, random PEFT adapters of mixed ranks and modules and perhaps trained ones, one
list of requests, half of them sampled with seeds. Each run has fresh processes with the same settings, warm-up and
requests: the engine alone in a closed loop of `client.users` unfinished requests, or `slora serve` and as many users of
locust that stream their answers. Goodput is the generated tokens of correctly answered requests by the time from the
first request to the last answer. The clients' CPU time comes from the server's cores. Other processes disturb a run, so
each result has their share of the CPU; the CPU time of a token suffers less from them.
"""

from __future__ import annotations

import json
import shutil
import signal
import sys
import tempfile
import time
from contextlib import AbstractContextManager
from dataclasses import asdict, fields, replace
from pathlib import Path
from subprocess import Popen
from typing import Any

import numpy as np
import psutil

from experiments.config.schema import RunConfig, adapter_directories
from experiments.rounds import Outcome
from experiments.runners.real import system_settings
from experiments.runners.workload import run_workload
from experiments.serving.answers import Answers
from experiments.serving.processes import Server, child, clients, finish, serving
from experiments.serving.soak import IN_USE, Watch, growth
from experiments.workloads import WorkloadRequest, engine_requests, write_requests
from slora_jax import EngineConfig
from slora_jax.demo.adapters import write_adapters
from slora_jax.demo.checkpoint import Widths, write_checkpoint
from slora_jax.demo.models import CHAT_LOAD, TINY_LOAD
from slora_jax.engine.sizing import adapter_geometry
from slora_jax.models import ModelConfig

IDLE_SECONDS = 5.0
"""After the last answer, until the server's counters, which it updates every second, are read."""
COUNTED = {
    "steps": "engine_steps",
    "tokens_generated": "generated_tokens",
    "adapter_loads": "adapter_loads",
    "adapter_evictions": "adapter_evictions",
    "preemptions": "preemptions",
}
"""Fields of `EngineStats`, and the server's names for them."""


class LoadTest:
    """Carries out load tests; their files are in a temporary directory unless a run names one."""

    def __init__(self) -> None:
        self._scratch = tempfile.TemporaryDirectory()
        self._handler = signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # ends the children, as Ctrl-C does

    def close(self) -> None:
        """Removes the files, and restores the handler of SIGTERM."""
        signal.signal(signal.SIGTERM, self._handler)
        self._scratch.cleanup()

    order = None
    """Every run has fresh processes, so the rounds need no order."""

    def measure(self, run: RunConfig, round_number: int) -> Outcome:
        """Returns the figures of one round of a run."""
        assert run.load_test is not None
        files = _Files(run, run.load_test.directory or Path(self._scratch.name))
        num_pages, num_requests = files.write(round_number)
        match run.load_test.side:
            case "alone":
                return _outcome(*files.alone(), num_requests)
            case "served":
                return _outcome(*files.served(), num_requests)
        found, watch, idle = files.soak()
        outcome = _outcome(found, None, 0)
        grown = {f"{name}_{key}": value for name, one in growth(watch.samples).items() for key, value in one.items()}
        lost = num_pages - sum(idle.values()) + sum(idle[kind] for kind in IN_USE)
        samples = [asdict(sample) for sample in watch.samples[:: max(1, len(watch.samples) // 60)]]
        return Outcome(
            {**outcome.metrics, **grown, "pages_lost": lost},
            None,  # the list is repeated: its answers are those of the other sides
            {"samples": samples, "pages_when_idle": idle},
            (*outcome.problems, *([f"{lost} pages are neither free nor idle at the end"] if lost else ())),
        )


class _Files:
    """The files that both sides read, and the two sides."""

    def __init__(self, run: RunConfig, directory: Path) -> None:
        self._run, self._directory = run, directory
        self._model, self._adapters, self._config = (directory / name for name in ("model", "adapters", "config.json"))
        if run.has_weights:
            self._model = run.model_file
        self._warm_up, self._requests = directory / "warm_up.jsonl", directory / "requests.jsonl"
        self._answers = directory / "answers.json"

    def write(self, round_number: int) -> tuple[int, int]:
        """Writes the settings, the requests, and the model and adapters unless the directory has them. Returns the
        numbers of pages in the pool and of requests."""
        run, made = self._run, self._directory / "made.json"
        assert run.load_test is not None
        self._directory.mkdir(parents=True, exist_ok=True)
        shape, trained = run.model_config(), run.load_test.trained
        content = json.dumps([asdict(shape), run.adapters.count, run.adapters.ranks, run.seed, str(trained)])
        longest = run.engine.max_model_len or 256
        engine = system_settings(run, longest).engine
        if not made.exists() or made.read_text() != content:
            for old in ("model", "adapters"):
                shutil.rmtree(self._directory / old, ignore_errors=True)
            if not run.has_weights:
                widths = Widths(shape.hidden_size, shape.num_heads, shape.num_kv_heads, shape.intermediate_size)
                write_checkpoint(self._model, shape.num_layers, run.seed, widths)
            geometry = adapter_geometry(ModelConfig.from_directory(self._model), engine.page_size)
            copied = [] if trained is None else adapter_directories(trained)
            load = CHAT_LOAD if run.has_weights else TINY_LOAD
            count = run.adapters.count - len(copied)
            write_adapters(self._adapters, geometry, count, run.seed, run.adapters.ranks, load.targets)
            for one in copied:
                shutil.copytree(one, self._adapters / one.name)
            made.write_text(content)
        given = {f.name: getattr(engine, f.name) for f in fields(engine)}
        changed = {name: value for name, value in given.items() if value != getattr(EngineConfig(), name)}
        self._config.write_text(json.dumps({"engine": changed}))
        parameters = {**run.workload.parameters, "requests": run.load_test.warm_up}
        warm_up = replace(run, seed=run.seed + 10_000, workload=replace(run.workload, parameters=parameters))
        write_requests(self._warm_up, self._sampled(warm_up, round_number))
        requests = self._sampled(run, round_number)
        write_requests(self._requests, requests)
        assert engine.num_pages is not None
        return engine.num_pages, len(requests)

    def _sampled(self, run: RunConfig, round_number: int) -> list[WorkloadRequest]:
        vocab_size, test = ModelConfig.from_directory(self._model).vocab_size, run.load_test
        assert test is not None
        sampled = {"temperature": test.temperature, "top_p": test.top_p}
        requests = engine_requests(run_workload(run, round_number), vocab_size, run.seed)
        order = np.random.default_rng(run.seed + round_number).permutation(run.adapters.count)  # by popularity
        there = [one.name for one in adapter_directories(self._adapters)]
        names = [there[order[int(request.adapter or 0)]] for request in requests]
        return [
            replace(request, adapter=name, seed=i, **(sampled if i % 2 else {}))
            for i, (request, name) in enumerate(zip(requests, names, strict=True))
        ]

    def alone(self) -> tuple[Answers, dict[str, float]]:
        """Returns the engine's answers to all requests, and its counters."""
        stats = self._directory / "stats.json"
        files = (self._model, self._adapters, self._config, self._warm_up, self._requests, self._answers, stats)
        command = [sys.executable, "-m", "experiments.serving.offline", *map(str, files)]
        with child([*command, "--users", str(self._run.client.users)]) as process:
            finish(process, "the engine alone")
        counted = json.loads(stats.read_text())
        return self._take_answers(), {name: counted[name] for name in COUNTED}

    def served(self) -> tuple[Answers, dict[str, float]]:
        """Returns the answers that the clients of a server got, and the server's counters."""
        with self._serving() as server:
            with self._locust(server) as locust:
                finish(locust, "locust")
            time.sleep(IDLE_SECONDS)
            counted = server.metrics()
            server.stop()
        return self._take_answers(), {name: counted[f"slora_{at}_total"][()] for name, at in COUNTED.items()}

    def soak(self) -> tuple[Answers, Watch, dict[str, int]]:
        """Returns the clients' answers, the samples of the server during it, and the idle pool afterwards."""
        assert self._run.load_test is not None
        with self._serving() as server:
            watch = Watch(server)
            with self._locust(server, self._run.load_test.soak_seconds) as locust:
                watch.run(lambda: locust.poll() is not None)
                finish(locust, "locust")
            time.sleep(IDLE_SECONDS)
            pages = watch.sample().pages
            server.stop()
        return self._take_answers(), watch, pages

    def _serving(self) -> AbstractContextManager[Server]:
        arguments = [str(self._model), "--adapters", str(self._adapters), "--config", str(self._config)]
        return serving(arguments, self._directory / "server.log")

    def _locust(self, server: Server, for_seconds: float = 0.0) -> AbstractContextManager[Popen]:
        files = (self._warm_up, self._requests, self._answers)
        return clients(server.url, server.pid, self._run.client.users, *files, for_seconds)

    def _take_answers(self) -> Answers:
        found = Answers.read(self._answers)
        self._answers.unlink()
        return found


def _outcome(found: Answers, counted: dict[str, float] | None, num_requests: int) -> Outcome:
    """Returns goodput in tokens per second; latencies in seconds; CPU time as a share of that of all cores, and in
    microseconds a token.

    Args:
      counted: the engine's counters, with the warm-up; a step's tokens and seconds are means.
      num_requests: how many have an entry in the outcome's tokens.
    """
    assert found.cpu is not None
    cpu, cores = found.cpu, len(psutil.Process().cpu_affinity())
    used = {"engine": cpu.engine, "main_thread": cpu.main_thread, "client": cpu.client}
    per_token = {name: 1e6 * seconds / found.tokens for name, seconds in used.items()}
    metrics: dict[str, Any] = {
        "goodput": found.tokens / found.seconds,
        "seconds": found.seconds,
        "requests": len(found.answered),
        "tokens": found.tokens,
        "failed": len(found.failures),
        "cpu_microseconds_per_token": per_token["engine"] + per_token["client"],
        "cpu_share_of_others": (cpu.machine - cpu.engine - cpu.client) / found.seconds / cores,
    }
    for name, seconds in used.items():
        metrics[f"cpu_share_of_{name}"] = seconds / found.seconds / cores
        metrics[f"cpu_microseconds_per_token_of_{name}"] = per_token[name]
    for name, values in (
        ("first_token_latency", [answer.first_token for _, answer in found.answered]),
        ("latency", [answer.last_token for _, answer in found.answered]),
    ):
        metrics[f"{name}_p50"], metrics[f"{name}_p99"] = np.percentile(values, [50, 99]).tolist()
    if counted is not None:
        per_step = counted["tokens_generated"] / counted["steps"]
        metrics |= counted | {"tokens_per_step": per_step, "seconds_per_step": per_step / metrics["goodput"]}
    answers = {number: answer.token_ids for number, answer in found.answered}
    tokens = [answers.get(number, []) for number in range(num_requests)]
    return Outcome(metrics, tokens, {}, tuple(found.failures))
