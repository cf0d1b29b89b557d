"""Makes requests for many adapters and serves them with continuous batching."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from tqdm import tqdm

from slora_jax.demo.adapters import DemoAdapter
from slora_jax.demo.corpus import QUESTIONS, SENTENCES
from slora_jax.engine import Engine, EngineStats, RequestOutput
from slora_jax.metrics import PoolPages
from slora_jax.scheduling import SamplingParams

BASE_ONLY = 0.1
"""Share of requests without an adapter."""
ARRIVALS_PER_STEP = 1.0
MAX_SENTENCES = 4
MIN_TOKENS, MAX_TOKENS = 16, 32


@dataclass(frozen=True)
class DemoRequest:
    """A request for a greedy answer.

    Attributes:
      adapter: the adapter that answers; None: the base model.
      step: engine step before which the request is added.
      chat: the prompt is a user message for the model's chat template.
    """

    prompt: str
    adapter: DemoAdapter | None
    max_tokens: int
    step: int
    chat: bool = False


@dataclass(frozen=True)
class Served:
    """Result of a run.

    Attributes:
      outputs: in the order of the requests.
      stats: the engine's counters at the end.
      seconds: duration.
      pages: kind -> pages in the pool after each step, int `[steps]`.
    """

    outputs: list[RequestOutput]
    stats: EngineStats
    seconds: float
    pages: dict[str, np.ndarray]


def make_traffic(adapters: Sequence[DemoAdapter], count: int, seed: int, chat: bool = False) -> list[DemoRequest]:
    """Makes `count` requests in order of arrival: questions if `chat`, else texts.

    Every adapter is used once before any is used again.
    """
    rng = np.random.default_rng(seed)
    num_base = round(count * BASE_ONLY)
    uses: list[DemoAdapter | None] = [None] * num_base
    while len(uses) < count:
        uses += [adapters[i] for i in rng.permutation(len(adapters))[: count - len(uses)]]
    steps = np.cumsum(rng.exponential(1 / ARRIVALS_PER_STEP, count)).astype(int)
    requests: list[DemoRequest] = []
    for use, step in zip(rng.permutation(np.array(uses, object)), steps.tolist(), strict=True):
        sentences = rng.choice(SENTENCES, rng.integers(1, MAX_SENTENCES, endpoint=True), replace=False)
        max_tokens = int(rng.integers(MIN_TOKENS, MAX_TOKENS, endpoint=True))
        prompt = QUESTIONS[len(requests) % len(QUESTIONS)] if chat else " ".join(sentences)
        requests.append(DemoRequest(prompt, use, max_tokens, step, chat))
    return requests


def chat_prompt(tokenizer: Any, message: str) -> list[int]:
    """Token ids of a user message in the model's chat template, up to the beginning of the answer."""
    messages = [{"role": "user", "content": message}]
    text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    return tokenizer(text, add_special_tokens=False)["input_ids"]


def serve(engine: Engine, requests: Sequence[DemoRequest]) -> Served:
    """Adds each request at its step and runs the engine until all are answered, with a progress bar."""
    outputs: dict[str, RequestOutput] = {}
    pages: list[PoolPages] = []
    waiting = list(enumerate(requests))[::-1]
    start = time.perf_counter()
    with tqdm(total=len(requests), desc="serving", unit="request") as bar:
        while waiting or engine.has_work():
            step = len(pages)
            while waiting and (waiting[-1][1].step <= step or not engine.has_work()):
                i, request = waiting.pop()
                params = SamplingParams(max_tokens=request.max_tokens)
                name = None if request.adapter is None else request.adapter.name
                prompt = chat_prompt(engine.tokenizer, request.prompt) if request.chat else request.prompt
                engine.add_request(prompt, params, name, request_id=str(i))
            for delta in engine.step():
                if delta.output is not None:
                    outputs[delta.request_id] = delta.output
                    bar.update()
            stats = engine.stats()
            pages.append(stats.pages)
            state = f"running {stats.running}, waiting {stats.waiting}, adapters in pool {stats.resident_adapters}"
            bar.set_postfix_str(state, refresh=False)
    engine.check()
    return Served(
        outputs=[outputs[str(i)] for i in range(len(requests))],
        stats=engine.stats(),
        seconds=time.perf_counter() - start,
        pages={kind: np.array([getattr(p, kind) for p in pages]) for kind in ("kv", "adapter", "free")},
    )
