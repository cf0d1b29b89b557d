"""The demo from beginning to end: make, start, serve, check, and say what happened."""

from __future__ import annotations

import json
import shutil
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from slora_jax.demo.adapters import RANKS, DemoAdapter, write_adapters
from slora_jax.demo.checkpoint import write_checkpoint
from slora_jax.demo.settings import DemoSettings
from slora_jax.demo.traffic import DemoRequest, Served, make_traffic, serve
from slora_jax.demo.verify import first_difference, load_weights, merge
from slora_jax.engine import Engine, EngineConfig, RequestOutput, adapter_geometry
from slora_jax.errors import ConfigError
from slora_jax.models import ModelConfig

MARKER = ".slora-demo"


def run_demo(settings: DemoSettings) -> bool:
    """Runs the demo, talking to stdout. Returns whether every checked answer agrees with its merged weights.

    Raises:
      ConfigError: the directory holds something else.
    """
    model_dir, adapters_dir = settings.directory / "model", settings.directory / "adapters"
    _prepare(settings.directory)
    config = EngineConfig(
        dtype="float32",
        num_pages=settings.num_pages,
        max_seqs=32,
        max_tokens_per_step=128,
        decode_buckets=(32,),
        mixed_buckets=(128,),
        max_rank=max(RANKS),
        compilation_cache_dir=settings.directory / "compiled",
    )
    print(f"1. Making a small Llama model and {settings.adapters} LoRA adapters, all with random weights.")
    parameters = write_checkpoint(model_dir, settings.layers, settings.seed)
    geometry = adapter_geometry(ModelConfig.from_directory(model_dir), config.page_size)
    adapters = write_adapters(adapters_dir, geometry, settings.adapters, settings.seed)
    print(f"   The model, with {parameters / 1e6:.1f} million parameters, is in {model_dir}")
    ranks = ", ".join(map(str, RANKS))
    print(f"   The adapters, of ranks {ranks} on 2, 4 or 7 modules of each layer, are in {adapters_dir}")

    print("2. Starting the engine: every program that it will ever run is compiled now.")
    with Engine.from_pretrained(model_dir, config) as engine:
        pages = sum(info.num_pages for info in engine.load_adapters(adapters_dir))
        print(f"   The memory pool has {engine.allocator.capacity} pages, for adapters and keys and values together.")
        print(f"   All adapters at once would take {pages}: they must come and go.")
        requests = make_traffic(adapters, settings.requests, settings.seed)
        print(f"3. Serving {len(requests)} requests for them, which arrive while others are being answered.")
        served = serve(engine, requests)
    for line in _table(requests, served, engine.allocator.capacity):
        print("   " + line)

    print("4. Checking answers: each again, alone, by a plain NumPy model with the adapter merged into its weights.")
    return _check(model_dir, requests, served.outputs, settings.checks)


def _prepare(directory: Path) -> None:
    """An empty directory but for the compiled programs of earlier demos."""
    if directory.exists() and any(directory.iterdir()) and not (directory / MARKER).exists():
        raise ConfigError(f"{directory}: holds something that no earlier demo left there; choose another directory")
    directory.mkdir(parents=True, exist_ok=True)
    (directory / MARKER).touch()
    for name in ("model", "adapters"):
        shutil.rmtree(directory / name, ignore_errors=True)


def _table(requests: Sequence[DemoRequest], served: Served, capacity: int) -> list[str]:
    """What the run did, one aligned line each."""
    stats, outputs = served.stats, served.outputs
    first = np.array([o.metrics.first_token_latency for o in outputs], float)
    median, p99 = np.percentile(first, [50, 99])
    rows = {
        "requests": f"{len(outputs)}, {sum(r.adapter is None for r in requests)} of them without an adapter",
        "distinct adapters": f"{len({r.adapter for r in requests} - {None})}",
        "tokens": f"{stats.tokens_generated} generated in {served.seconds:.1f} s: "
        f"{stats.tokens_generated / served.seconds:.0f} per second",
        "time to first token": f"median {median:.2f} s, p99 {p99:.2f} s",
        "adapter loads": f"{stats.adapter_loads}; {stats.adapter_hits} times the adapter was still in the pool",
        "adapter evictions": f"{stats.adapter_evictions}, to make room",
        "preemptions": f"{stats.preemptions} requests set back for want of pages, and computed again",
    }
    for kind, label in (("kv", "KV cache pages"), ("adapter", "adapter pages"), ("free", "free pages")):
        pages = served.pages[kind]
        share = 100 * pages.mean() / capacity
        rows[label] = f"average {pages.mean():.0f} ({share:.0f} % of the pool), at most {pages.max()}"
    width = max(map(len, rows))
    return [f"{label:{width}}  {value}" for label, value in rows.items()]


def _check(model_dir: Path, requests: Sequence[DemoRequest], outputs: Sequence[RequestOutput], checks: int) -> bool:
    """Compares a sample with its merged weights, says so request by request, and returns whether all agree."""
    config = json.loads((model_dir / "config.json").read_text())
    base = load_weights(model_dir / "model.safetensors")
    sample = _sample(requests, outputs, checks)
    with_adapter = changed = failed = 0
    for i in sample:
        adapter, output = requests[i].adapter, outputs[i]
        answer = (output.prompt_token_ids, output.token_ids, requests[i].max_tokens)
        weights = base if adapter is None else merge(base, adapter.directory)
        difference = first_difference(weights, config, *answer)
        verdict = f"all {len(output.token_ids)} tokens agree"
        if difference is not None:
            failed += 1
            found, expected = ("the end" if t is None else t for t in (difference.token, difference.expected))
            verdict = f"DIFFERS: token {difference.position} is {found}, not {expected}"
        what = "base model"
        if adapter is not None:
            with_adapter += 1
            changed += first_difference(base, config, *answer) is not None
            what = f"{adapter.name}, rank {adapter.rank:2}, {' '.join(adapter.targets)}"
        print(f"   request {i:4}  {what:45}  {verdict}")
    if failed:
        print(f"   {failed} of {len(sample)} answers DIFFER from those of the merged weights. The engine is wrong.")
        return False
    print(f"   All {len(sample)} agree with the merged weights token for token.")
    print(f"   The base model alone would have answered {changed} of the {with_adapter} with adapters differently.")
    return True


def _sample(requests: Sequence[DemoRequest], outputs: Sequence[RequestOutput], count: int) -> list[int]:
    """Requests of different adapters, every combination of rank and targets in turn; the most preempted ones first,
    otherwise at random."""
    used: set[DemoAdapter | None] = set()
    taken: Counter[tuple | None] = Counter()
    turn: dict[int, int] = {}
    order = np.random.default_rng(0).permutation(len(requests)).tolist()
    for i in sorted(order, key=lambda i: -outputs[i].metrics.preemptions):
        adapter = requests[i].adapter
        if adapter not in used:
            used.add(adapter)
            kind = None if adapter is None else (adapter.rank, adapter.targets)
            turn[i] = taken[kind]
            taken[kind] += 1
    return sorted(sorted(turn, key=turn.__getitem__)[:count])
