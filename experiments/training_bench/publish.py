"""Latency of new weights in a serving engine: `python -m experiments.training_bench.publish`.

`Trainer.publish` beside a PEFT directory that is written and loaded. Both end with the first token of a request that
uses the new weights, while other requests are decoded.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np

from experiments.config.schema import MODELS
from experiments.machine import provenance, write_json
from experiments.rounds import turns
from experiments.systems.peft import write_random_checkpoint
from experiments.training_bench.settings import RANKS, rank_of
from slora_jax import Engine, EngineConfig, SamplingParams
from slora_jax.adapters import LoraConfig, write_peft
from slora_jax.serving.observability.prometheus import Compilations
from slora_jax.training import Adam, Example, Trainer, TrainerConfig

PROMPT, LENGTH, RUNNING = 48, 64, 4
"""Tokens of the request's prompt, tokens of a training step, other requests."""


def main(argv: Sequence[str] | None = None) -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", type=Path, help="a Hugging Face directory (default: random, SmolLM2-135M's shape)")
    parser.add_argument("--rounds", type=int, default=7, help="timed rounds (default: %(default)s)")
    parser.add_argument("--output", type=Path, default=Path("experiments/results/publish.json"))
    args = parser.parse_args(argv)
    if args.rounds < 1:
        parser.error(f"--rounds {args.rounds}: must be 1 or more")
    with tempfile.TemporaryDirectory() as scratch:
        path = Path(scratch)
        model = args.model or write_random_checkpoint(MODELS / "smollm2-135m.json", path / "model", seed=0)
        results = measure(model, path, args.rounds)
    for name, ways in results["adapters"].items():
        line = ", ".join(f"{way} {ways[way]['to_first_token']:.3f} s" for way in ("publish", "files"))
        print(f"{name}: first token after {line}; ratio {ways['files_over_publish']}")
    print(f"programs compiled: {results['compilations']}")
    described = args.model.name if args.model else "random, smollm2-135m"
    write_json(args.output, {"model": described, "provenance": provenance(("jax", "jaxlib", "numpy"))} | results)


def measure(model: Path, scratch: Path, rounds: int) -> dict[str, Any]:
    """Trains one adapter of each rank a step further in every round, then publishes it in both ways. Returns JSON
    values, times in seconds."""
    engine = Engine.from_pretrained(
        model, EngineConfig(dtype="float32", max_num_seqs=8, max_num_batched_tokens=64, num_pages=600, progress=False)
    )
    vocabulary = engine.model.vocab_size
    trainer = Trainer.of_engine(
        engine, TrainerConfig(num_pages=600, max_adapters=len(RANKS), lengths=(LENGTH,), tokens=(LENGTH,))
    )
    for i, rank in enumerate(RANKS):
        trainer.add(f"rank {rank}", LoraConfig(r=rank_of(i), lora_alpha=16, target_modules="all-linear"), Adam(1e-3))
    rng = np.random.default_rng(0)

    def train(name: str) -> None:
        ids = rng.integers(0, vocabulary, LENGTH + 1).astype(np.int32)
        trainer.forward_backward({name: [Example(ids[:-1], ids[1:], np.ones(LENGTH, np.float32))]})
        trainer.optim_step([name])

    def by_files(name: str) -> None:
        engine.load_adapter(name, write_peft(scratch / "published", trainer.adapter(name)))

    ways: dict[str, Callable[[str], Any]] = {"publish": lambda name: trainer.publish(engine, name), "files": by_files}
    runs = [(f"rank {rank}", way) for rank in RANKS for way in ways]
    seconds: dict[tuple[str, str], list[tuple[float, float]]] = {run: [] for run in runs}
    with closing(Compilations()) as compilations:
        for number, (name, way) in turns(runs, rounds, "publish"):
            train(name)
            if number == 1:
                compilations.ready()  # round 0 warms up
            times = _time(engine, lambda way=way, name=name: ways[way](name), name, rng, vocabulary)
            if number:
                seconds[name, way].append(times)
    adapters: dict[str, dict[str, Any]] = {}
    for name in dict.fromkeys(name for name, _ in runs):
        adapters[name] = {way: _summary(seconds[name, way]) for way in ways}
        pairs = [b / a for (_, a), (_, b) in zip(seconds[name, "publish"], seconds[name, "files"], strict=True)]
        adapters[name]["files_over_publish"] = round(statistics.median(pairs), 2)
    return {"compilations": compilations.after_ready, "running_requests": RUNNING, "adapters": adapters}


def _time(
    engine: Engine, publish: Callable[[], Any], name: str, rng: np.random.Generator, vocabulary: int
) -> tuple[float, float]:
    """Seconds of the call, and to the first token of a request after it."""
    prompts = rng.integers(0, vocabulary, (RUNNING + 1, PROMPT)).tolist()
    long = SamplingParams(max_tokens=64, ignore_eos=True)
    running = [engine.add_request(prompt, long) for prompt in prompts[1:]]
    for _ in range(2 * RUNNING):
        engine.step()
    begin = time.perf_counter()
    publish()
    called = time.perf_counter()
    request = engine.add_request(prompts[0], SamplingParams(max_tokens=1), name)
    while not any(delta.request_id == request for delta in engine.step()):
        pass
    first = time.perf_counter()
    for other in running:
        engine.cancel(other)
    while engine.has_work():
        engine.step()
    return called - begin, first - begin


def _summary(seconds: list[tuple[float, float]]) -> dict[str, float]:
    calls, firsts = zip(*seconds, strict=True)
    return {"call": round(statistics.median(calls), 4), "to_first_token": round(statistics.median(firsts), 4)}


if __name__ == "__main__":
    main()
