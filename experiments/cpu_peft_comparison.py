"""Throughput on a CPU, side by side with PEFT: `python -m experiments.cpu_peft_comparison`.

One model of about 100M parameters in float32, rank-16 adapters on q, k, v, o, the same requests for everyone, all
there at the start. Systems:

- `slora/N`: this engine with N adapters; `slora/base`: the same requests without adapters.
- `peft-grouped/N`: the PEFT library as S-LoRA's paper drove it: requests grouped by adapter, one batch per group.
- `peft-mixed/N`: PEFT's own mixed batches (`adapter_names`), all requests in one batch.

Every round runs every system once, in turn, so that a noisy machine disturbs all alike; medians over rounds and the
ratios within rounds are written to a JSON file, and whether the tokens of both libraries are the same.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from experiments.machine import provenance
from experiments.systems.peft import PeftModel
from slora_jax import Engine, EngineConfig, SamplingParams
from slora_jax.adapters import LoraAdapter, random_adapter, write_peft

TARGETS = ("q", "k", "v", "o")


@dataclass(frozen=True)
class Settings:
    """hidden .. vocab: the model. requests prompts of prompt_low..prompt_high tokens, each with `output` new tokens.
    peft_adapters: how many adapters each comparison with PEFT spreads the requests over; many_adapters: the two sizes
    of the comparison with itself, over `many_requests` requests. rounds: timed repetitions."""

    layers: int = 12
    hidden: int = 768
    heads: int = 12
    intermediate: int = 2048
    vocab: int = 32000
    rank: int = 16
    requests: int = 64
    prompt_low: int = 16
    prompt_high: int = 128
    output: int = 32
    peft_adapters: tuple[int, ...] = (1, 8, 32)
    many_adapters: tuple[int, int] = (5, 1000)
    many_requests: int = 128
    num_pages: int = 1400
    max_num_seqs: int = 64
    rounds: int = 3
    seed: int = 0


QUICK = Settings(
    layers=2, hidden=64, heads=4, intermediate=128, vocab=512, rank=4, requests=6, prompt_high=24, output=4,
    peft_adapters=(1, 3), many_adapters=(2, 10), many_requests=10, num_pages=200, max_num_seqs=8, rounds=1,
)  # fmt: skip
"""The same in seconds, to see that it runs; its numbers mean nothing."""


@dataclass(frozen=True)
class Workload:
    """Requests by number: prompts of token ids, and each one's adapter (None: base only)."""

    prompts: list[list[int]]
    adapters: list[str | None]


def workload(settings: Settings, count: int, num_adapters: int) -> Workload:
    """`count` requests spread evenly over `num_adapters` adapters, in random order; 0 adapters: base only."""
    rng = np.random.default_rng(settings.seed)
    lengths = rng.integers(settings.prompt_low, settings.prompt_high + 1, count)
    prompts = [rng.integers(3, settings.vocab, n).tolist() for n in lengths]
    if not num_adapters:
        return Workload(prompts, [None] * count)
    which = rng.permutation(np.arange(count) * num_adapters // count)
    return Workload(prompts, [f"adapter-{i}" for i in which])


def make_model(settings: Settings, directory: Path) -> None:
    """A random Llama checkpoint, saved by transformers."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(settings.seed)
    config = LlamaConfig(
        vocab_size=settings.vocab,
        hidden_size=settings.hidden,
        intermediate_size=settings.intermediate,
        num_hidden_layers=settings.layers,
        num_attention_heads=settings.heads,
        max_position_embeddings=1024,
        tie_word_embeddings=True,
        initializer_range=0.05,
    )
    LlamaForCausalLM(config).save_pretrained(directory)


class Slora:
    """This engine over the checkpoint."""

    def __init__(self, settings: Settings, model_dir: Path) -> None:
        self.settings = settings
        self.engine = Engine.from_pretrained(
            model_dir,
            EngineConfig(
                dtype="float32",
                num_pages=settings.num_pages,
                max_num_seqs=settings.max_num_seqs,
                max_num_batched_tokens=4 * settings.max_num_seqs,
                max_model_len=512,
                max_lora_rank=64,
                prefix_cache=False,  # every round has the same prompts, and each is to be computed
                host_adapter_bytes=12 << 30,
            ),
        )

    def add(self, number: int, adapter: LoraAdapter) -> None:
        self.engine.load_adapter(f"adapter-{number}", adapter)

    def run(self, load: Workload) -> list[list[int]]:
        """Output tokens by request."""
        params = SamplingParams(max_tokens=self.settings.output, ignore_eos=True)
        number = {
            self.engine.add_request(p, params, a): i
            for i, (p, a) in enumerate(zip(load.prompts, load.adapters, strict=True))
        }
        outputs: list[list[int]] = [[] for _ in number]
        while self.engine.has_work():
            for delta in self.engine.step():
                outputs[number[delta.request_id]] += delta.token_ids
        return outputs


class Peft:
    """The real library over the same checkpoint and adapters, left-padded batches, greedy, with its KV cache."""

    def __init__(self, settings: Settings, model_dir: Path, adapter_dirs: list[Path]) -> None:
        self.settings = settings
        self.model = PeftModel(model_dir, {f"adapter-{i}": path for i, path in enumerate(adapter_dirs)})

    def run_grouped(self, load: Workload) -> list[list[int]]:
        """One batch per adapter, one after the other."""
        outputs: list[list[int]] = [[] for _ in load.prompts]
        for name in dict.fromkeys(load.adapters):
            members = [i for i, adapter in enumerate(load.adapters) if adapter == name]
            for i, tokens in zip(members, self._generate([load.prompts[i] for i in members], name), strict=True):
                outputs[i] = tokens
        return outputs

    def run_mixed(self, load: Workload) -> list[list[int]]:
        """All requests in one batch, each with its adapter."""
        return self._generate(load.prompts, load.adapters)

    def _generate(self, prompts: list[list[int]], adapters: str | list[str | None] | None) -> list[list[int]]:
        outputs: list[list[int]] = [[] for _ in prompts]
        for step in self.model.decode(prompts, [self.settings.output] * len(prompts), adapters):
            for row, token in step.items():
                outputs[row].append(token)
        return outputs


def compare(settings: Settings, scratch: Path) -> dict[str, Any]:
    """Builds everything, times every system, compares tokens, and returns the results as JSON values."""
    model_dir = scratch / "model"
    make_model(settings, model_dir)
    slora = Slora(settings, model_dir)
    geometry = slora.engine.store.geometry
    dirs = []
    for i in tqdm(range(max(settings.many_adapters)), desc="making adapters", unit="adapter"):
        adapter = random_adapter(geometry, settings.rank, TARGETS, seed=i)
        slora.add(i, adapter)
        if i < max(settings.peft_adapters):
            dirs.append(write_peft(scratch / f"adapter-{i}", adapter))
    peft = Peft(settings, model_dir, dirs)

    systems: dict[str, tuple[Callable[[Workload], list[list[int]]], Workload]] = {
        "slora/base": (slora.run, workload(settings, settings.requests, 0))
    }
    for n in settings.peft_adapters:
        load = workload(settings, settings.requests, n)
        systems[f"slora/{n}"] = (slora.run, load)
        systems[f"peft-grouped/{n}"] = (peft.run_grouped, load)
        systems[f"peft-mixed/{n}"] = (peft.run_mixed, load)
    for n in settings.many_adapters:
        systems[f"slora-many/{n}"] = (slora.run, workload(settings, settings.many_requests, n))

    rates: dict[str, list[float]] = {name: [] for name in systems}
    tokens: dict[str, list[list[int]]] = {}
    with tqdm(total=settings.rounds * len(systems), desc="timing", unit="run") as bar:
        for _ in range(settings.rounds):
            for name, (run, load) in systems.items():
                bar.set_postfix_str(name)
                start = time.perf_counter()
                tokens[name] = run(load)
                rates[name].append(len(load.prompts) * settings.output / (time.perf_counter() - start))
                bar.update()
    most = max(settings.peft_adapters)
    few, many = settings.many_adapters
    ratios = {
        f"slora over peft-grouped, {most} adapters": _ratio(rates, f"slora/{most}", f"peft-grouped/{most}"),
        f"slora over peft-mixed, {most} adapters": _ratio(rates, f"slora/{most}", f"peft-mixed/{most}"),
        f"{many} adapters over {few}": _ratio(rates, f"slora-many/{many}", f"slora-many/{few}"),
    } | {f"{n} adapters over base only": _ratio(rates, f"slora/{n}", "slora/base") for n in settings.peft_adapters}
    return {
        "settings": asdict(settings),
        "provenance": provenance(("jax", "jaxlib", "flax", "numpy", "torch", "transformers", "peft")),
        "tokens_agree": _agreement(tokens, settings),
        "output_tokens_per_second": {
            name: {"median": round(statistics.median(r), 3), "rounds": [round(x, 3) for x in r]}
            for name, r in rates.items()
        },
        "ratios_median_over_rounds": ratios,
        "engine": asdict(slora.engine.stats()),
    }


def _agreement(tokens: dict[str, list[list[int]]], settings: Settings) -> dict[str, str]:
    """Compares the engine's tokens with PEFT's, request by request."""
    agree = {}
    for n in settings.peft_adapters:
        for peer in ("peft-grouped", "peft-mixed"):
            same = sum(a == b for a, b in zip(tokens[f"slora/{n}"], tokens[f"{peer}/{n}"], strict=True))
            agree[f"slora and {peer}, {n} adapters"] = f"{same} of {settings.requests} requests, every token"
    return agree


def _ratio(rates: dict[str, list[float]], over: str, under: str) -> float:
    return round(statistics.median(a / b for a, b in zip(rates[over], rates[under], strict=True)), 3)


def _print(results: dict[str, Any]) -> None:
    rates = {name: f"{rate['median']:8.1f}" for name, rate in results["output_tokens_per_second"].items()}
    for title, rows in (
        ("output tokens per second (median)", rates),
        ("ratios (median over rounds)", results["ratios_median_over_rounds"]),
        ("greedy tokens equal", results["tokens_agree"]),
    ):
        print(f"\n{title}")
        for name, value in rows.items():
            print(f"  {name:42s} {value}")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="a toy model, in seconds; its numbers mean nothing")
    parser.add_argument("--rounds", type=int, help="timed repetitions of every system")
    parser.add_argument("--output", type=Path, default=Path("experiments/results/cpu_peft_comparison.json"))
    args = parser.parse_args()
    settings = QUICK if args.quick else Settings()
    if args.rounds:
        settings = Settings(**(asdict(settings) | {"rounds": args.rounds}))
    with tempfile.TemporaryDirectory() as scratch:
        results = compare(settings, Path(scratch))
    _print(results)
    if not args.quick:
        args.output.parent.mkdir(parents=True, exist_ok=True)
        args.output.write_text(json.dumps(results, indent=2) + "\n")
        print(f"written to {args.output}")


if __name__ == "__main__":
    main()
