"""Runs the demo: starts an engine, asks a question, makes adapters, serves requests, and checks answers."""

from __future__ import annotations

import os
import re
import shutil
import sys
import time
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import replace
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np

from slora_jax.demo import trained
from slora_jax.demo.adapters import DemoAdapter, write_adapters
from slora_jax.demo.checkpoint import write_checkpoint
from slora_jax.demo.models import DemoModel, choose_model
from slora_jax.demo.reference_weights import read_reference
from slora_jax.demo.settings import DemoSettings
from slora_jax.demo.traffic import DemoRequest, Served, chat_prompt, make_traffic, serve
from slora_jax.demo.verify import Weights, first_difference, merge
from slora_jax.engine import Engine, EngineConfig, RequestOutput
from slora_jax.errors import ConfigError, UnsupportedModelError
from slora_jax.models.config import model_names
from slora_jax.scheduling import SamplingParams

MARKER = ".slora-demo"
QUESTION = "What is the capital of France and what can I see there? Answer in two short sentences."
TRAINED_QUESTION = "What is the sun?"
ANSWER_TOKENS = 48
COLUMNS = 96
SHOWN_ANSWERS = 4


def run_demo(settings: DemoSettings) -> bool:
    """Runs the demo and prints its progress. Returns whether all checked answers agree with merged weights.

    Raises:
      ConfigError: the directory holds other files, or the model does not exist.
    """
    model, adapters_dir = choose_model(settings.model), settings.directory / "adapters"
    load = model.load
    _prepare(settings.directory)
    if model.notice:
        print(model.notice)
    print(f"1. The model: {model.name}.")
    path = _place(model, settings)
    config = EngineConfig(
        dtype="float32",
        num_pages=settings.num_pages or load.num_pages,
        max_num_seqs=load.max_num_seqs,
        max_num_batched_tokens=128,
        max_model_len=load.max_model_len,
        decode_buckets=(1, load.max_num_seqs) if load.chat else (load.max_num_seqs,),
        mixed_buckets=(128,),
        max_lora_rank=max(load.ranks),
        compilation_cache_dir=settings.directory / "compiled",
    )
    print("   Starting the engine. The first start compiles its programs; later starts find them on disk.", flush=True)
    start = time.perf_counter()
    with Engine.from_pretrained(path, config) as engine:
        print(f"   Ready after {time.perf_counter() - start:.0f} s.")
        if load.chat and engine.tokenizer.chat_template is None:
            load = replace(load, chat=False)
        if load.chat:
            _ask(engine)
        if model.trained and model.path is not None:
            engine.store.base_names = model_names(model.path)  # that of the link says nothing
            _show_trained(engine)
        print(f"2. Making {settings.adapters} LoRA adapters with random weights.")
        geometry = engine.store.geometry
        adapters = write_adapters(adapters_dir, geometry, settings.adapters, settings.seed, load.ranks, load.targets)
        pages = sum(info.num_pages for info in engine.load_adapters(adapters_dir))
        ranks = ", ".join(map(str, load.ranks))
        print(f"   Their ranks are {ranks}, on 2, 4 or 7 modules of each layer; they are in {adapters_dir}")
        print(f"   The memory pool has {engine.allocator.capacity} pages, shared by adapters and the KV cache.")
        print(f"   All adapters together need {pages} pages, so they are loaded and evicted as needed.")
        count = settings.requests or load.requests
        requests = make_traffic(adapters, count, settings.seed, load.chat)
        print(f"3. Serving {len(requests)} requests, which arrive while others are running.")
        served = serve(engine, requests)
    for line in _table(requests, served, engine.allocator.capacity):
        print("   " + line)
    if load.chat:
        for line in _answers(requests, served.outputs):
            print("   " + line)

    print("4. Checking answers one by one, in NumPy, with the adapter merged into the weights.", flush=True)
    try:
        base, reference_config = read_reference(path)
    except UnsupportedModelError as error:
        print(f"   Skipped, because the check supports only plain Llama models. {error}")
        return True
    agree = _check(base, reference_config, requests, served.outputs, settings.checks or load.checks)
    print(f"Try them: {_slora()} serve {path} --adapters {adapters_dir} --dtype float32")
    return agree


def _slora() -> str:
    """The command `slora`, with its path unless the shell finds it."""
    script = Path(sys.executable).with_name("slora")
    if shutil.which("slora") or not script.exists():
        return "slora"
    return os.path.relpath(script) if script.is_relative_to(Path.cwd()) else str(script)


def _prepare(directory: Path) -> None:
    """Creates the directory, or removes an earlier demo's files except compiled programs."""
    if directory.exists() and any(directory.iterdir()) and not (directory / MARKER).exists():
        raise ConfigError(f"{directory}: holds files that no earlier demo left there; choose another directory")
    directory.mkdir(parents=True, exist_ok=True)
    (directory / MARKER).touch()
    (directory / "model.gguf").unlink(missing_ok=True)
    for name in ("model", "adapters"):
        shutil.rmtree(directory / name, ignore_errors=True)


def _place(model: DemoModel, settings: DemoSettings) -> Path:
    """Returns the model's path. Writes the tiny model to the demo's directory; links a GGUF file there."""
    if model.path is None:
        path = settings.directory / "model"
        parameters = write_checkpoint(path, settings.layers, settings.seed)
        print(f"   It has {parameters / 1e6:.1f} million parameters and is in {path}")
        return path
    if model.path.is_dir():
        return model.path
    link = settings.directory / "model.gguf"
    link.symlink_to(model.path.resolve())
    return link


def _ask(engine: Engine) -> None:
    """Asks the base model a question and prints the answer as it is generated."""
    start, first = time.perf_counter(), None

    def pieces() -> Iterable[str]:
        nonlocal first
        prompt = chat_prompt(engine.tokenizer, QUESTION)
        for delta in engine.stream(prompt, SamplingParams(max_tokens=ANSWER_TOKENS)):
            first = first or time.perf_counter() - start
            yield delta.text

    print(f"   Question: {QUESTION}")
    _print_wrapped("   Answer:   ", pieces())
    print(f"   The first token came after {first:.2f} s, the last after {time.perf_counter() - start:.2f} s.")


def _show_trained(engine: Engine) -> None:
    """Prints the answers of the base model and of each trained adapter to the same message."""
    print("   Small adapters, trained with `slora train`, beside the base model, all in one batch:")
    shown = None
    for name, message, answer in trained.answers(engine, TRAINED_QUESTION):
        if message != shown:
            print(f"   {message}")
            shown = message
        _print_wrapped(f"     {name:12}", [answer])


def _print_wrapped(label: str, pieces: Iterable[str]) -> None:
    """Prints text word by word as its pieces arrive, in lines of at most `COLUMNS` characters."""
    print(label, end="", flush=True)
    column, word = len(label), ""
    for piece in chain(pieces, " "):
        *words, word = re.split(r"\s+", word + piece)
        for complete in filter(None, words):
            if column > len(label) and column + 1 + len(complete) > COLUMNS:
                print("\n" + " " * len(label), end="")
                column = len(label)
            space = " " if column > len(label) else ""
            print(space + complete, end="", flush=True)
            column += len(space + complete)
    print()


def _answers(requests: Sequence[DemoRequest], outputs: Sequence[RequestOutput]) -> list[str]:
    """Lines with a sample of the answers."""
    rows = ["some of the answers:"]
    for request, output in list(zip(requests, outputs, strict=True))[:: len(requests) // SHOWN_ANSWERS + 1]:
        name = "base model" if request.adapter is None else request.adapter.name
        line = f"{name:12}  {request.prompt} {' '.join((output.text or '').split())}"
        rows.append(line if len(line) <= COLUMNS - 3 else line[: COLUMNS - 6] + "...")
    return rows


def _table(requests: Sequence[DemoRequest], served: Served, capacity: int) -> list[str]:
    """Aligned lines with the run's metrics."""
    stats, outputs = served.stats, served.outputs
    first = np.array([o.metrics.first_token_latency for o in outputs], float)
    median, p99 = np.percentile(first, [50, 99])
    rows = {
        "requests": f"{len(outputs)}, {sum(r.adapter is None for r in requests)} of them without an adapter",
        "distinct adapters": f"{len({r.adapter for r in requests} - {None})}",
        "tokens": f"{stats.tokens_generated} generated in {served.seconds:.1f} s: "
        f"{stats.tokens_generated / served.seconds:.0f} per second",
        "time to first token": f"median {median:.2f} s, p99 {p99:.2f} s",
        "adapter loads": f"{stats.adapter_loads}; {stats.adapter_hits} times the adapter was already in the pool",
        "adapter evictions": f"{stats.adapter_evictions}, to make room",
        "preemptions": f"{stats.preemptions} (out of pages; the requests were recomputed later)",
    }
    for kind, label in (("kv", "KV cache pages"), ("adapter", "adapter pages"), ("free", "free pages")):
        pages = served.pages[kind]
        share = 100 * pages.mean() / capacity
        rows[label] = f"average {pages.mean():.0f} ({share:.0f} % of the pool), at most {pages.max()}"
    width = max(map(len, rows))
    return [f"{label:{width}}  {value}" for label, value in rows.items()]


def _check(
    base: Weights,
    config: dict[str, Any],
    requests: Sequence[DemoRequest],
    outputs: Sequence[RequestOutput],
    checks: int,
) -> bool:
    """Compares sampled answers with merged weights, prints each verdict, and returns whether all agree."""
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
        label = "base model"
        if adapter is not None:
            with_adapter += 1
            changed += first_difference(base, config, *answer) is not None
            label = f"{adapter.name}, rank {adapter.rank:2}, {' '.join(adapter.targets)}"
        print(f"   request {i:4}  {label:48}  {verdict}", flush=True)
    if failed:
        print(f"   {failed} of {len(sample)} answers DIFFER from those of the merged weights: the engine has a bug.")
        return False
    print(f"   All {len(sample)} agree with the merged weights token for token.")
    print(f"   The base model alone would have answered {changed} of the {with_adapter} with adapters differently.")
    return True


def _sample(requests: Sequence[DemoRequest], outputs: Sequence[RequestOutput], count: int) -> list[int]:
    """Indices of `count` requests with distinct adapters, cycling through the combinations of rank and targets; prefers
    the most often preempted requests, otherwise random."""
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
