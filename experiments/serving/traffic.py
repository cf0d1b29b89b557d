"""A fixed list of requests over many adapters, the same for everybody who is asked."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from experiments.workloads.popularity import zipf_shares
from slora_jax import SamplingParams


@dataclass(frozen=True)
class Traffic:
    """prompts of prompt_low..prompt_high tokens, max_tokens of output_low..output_high, all of them generated.
    exponent: of the Zipf distribution of the adapters. Every other request is sampled, with a seed of its own."""

    requests: int
    prompt_low: int
    prompt_high: int
    output_low: int
    output_high: int
    exponent: float = 1.0
    temperature: float = 0.8
    top_p: float = 0.95


@dataclass(frozen=True)
class LoadRequest:
    """One of the list. temperature 0: greedy."""

    prompt: tuple[int, ...]
    adapter: str
    max_tokens: int
    temperature: float
    top_p: float
    seed: int

    def params(self) -> SamplingParams:
        return SamplingParams(
            max_tokens=self.max_tokens,
            temperature=self.temperature,
            top_p=self.top_p,
            seed=self.seed,
            ignore_eos=True,
        )

    def body(self) -> dict[str, Any]:
        """Of POST /v1/completions."""
        return {
            "model": self.adapter,
            "prompt": self.prompt,
            "max_tokens": self.max_tokens,
            "temperature": self.temperature,
            "top_p": self.top_p,
            "seed": self.seed,
            "ignore_eos": True,
            "stream": True,
            "return_token_ids": True,
        }


def make_requests(traffic: Traffic, adapters: Sequence[str], vocab: int, seed: int) -> list[LoadRequest]:
    """Which adapters are the popular ones is drawn as well."""
    rng = np.random.default_rng(seed)
    count = traffic.requests
    order = rng.permutation(len(adapters))
    which = order[rng.choice(len(adapters), count, p=zipf_shares(len(adapters), traffic.exponent))]
    prompts = rng.integers(traffic.prompt_low, traffic.prompt_high + 1, count)
    outputs = rng.integers(traffic.output_low, traffic.output_high + 1, count)
    return [
        LoadRequest(
            prompt=tuple(rng.integers(2, vocab, prompts[i]).tolist()),
            adapter=adapters[which[i]],
            max_tokens=int(outputs[i]),
            temperature=traffic.temperature if i % 2 else 0.0,
            top_p=traffic.top_p if i % 2 else 1.0,
            seed=i,
        )
        for i in range(count)
    ]


def write_requests(path: Path, requests: Sequence[LoadRequest]) -> None:
    """As JSON, one a line."""
    path.write_text("".join(json.dumps(asdict(request)) + "\n" for request in requests))


def read_requests(path: Path) -> list[LoadRequest]:
    fields = map(json.loads, path.read_text().splitlines())
    return [LoadRequest(**(one | {"prompt": tuple(one["prompt"])})) for one in fields]
