"""The requests that show each mechanism. Prompts are random tokens; every round draws its own."""

from __future__ import annotations

from itertools import chain
from typing import Any

import numpy as np

from experiments.mechanisms.scale import Scale
from experiments.systems import Workload, WorkloadRequest

HOT = 4
"""Adapters of most requests in `mostly_cold`."""
COLD_SHARE = 0.2
BURST = 2.5
"""In `mostly_cold`: the share of requests with an adapter of their own, and how many arrive at once, of
`max_num_seqs`."""
INSTRUCTIONS = 96
"""Tokens with which all prompts of an adapter begin, in `instructed`."""
CONVERSATIONS, TURN, TURNS = 64, 24, 6
"""In `conversations`: how many there are, tokens that a turn adds to the prompt, and turns until one starts anew."""
ZIPF = 0.9


def mostly_cold(scale: Scale, number: int, rate: float | None) -> Workload:
    """A share of the requests each bring another adapter, in a cycle through all: by its turn it is long out of the
    pool and out of a small host memory. The others use the first few. They come in bursts of more than can run at once,
    at regular times: only what waits can be brought ahead."""
    rng = np.random.default_rng((scale.seed, 1, number))
    count, others = round(COLD_SHARE * scale.requests), scale.adapters - HOT
    cold = rng.permutation(scale.requests) < count
    turn = number * count + np.cumsum(cold)
    adapters = np.where(cold, HOT + turn % others, rng.integers(0, HOT, scale.requests)).tolist()
    burst = round(BURST * scale.engine.max_num_seqs)
    return [
        _request(rng, scale, adapter, rng.integers(24, 49), 64, 0.0 if rate is None else i // burst * burst / rate)
        for i, adapter in enumerate(adapters)
    ]


def many_adapters(scale: Scale, number: int, rate: float | None = None) -> Workload:
    """Short prompts, hardly two in a row with the same adapter: adapters need most of the pool."""
    rng = np.random.default_rng((scale.seed, 2, number))
    adapters = rng.permutation(np.arange(scale.requests) % scale.adapters)
    return [_request(rng, scale, adapter, rng.integers(8, 17), 12) for adapter in adapters.tolist()]


def long_prompts(scale: Scale, number: int, rate: float | None = None) -> Workload:
    """Long prompts and answers of two adapters: keys and values need most of the pool."""
    rng = np.random.default_rng((scale.seed, 3, number))
    return [_request(rng, scale, i % 2, rng.integers(96, 161), 40) for i in range(scale.requests // 2)]


def shifting(scale: Scale, number: int, rate: float | None = None) -> Workload:
    """The two in turn, twice each."""
    short, long = many_adapters(scale, number), long_prompts(scale, number)
    half, quarter = len(short) // 2, len(long) // 2
    return list(chain(short[:half], long[:quarter], short[half:], long[quarter:]))


def instructed(scale: Scale, number: int, rate: float | None = None) -> Workload:
    """Eight adapters, each with its instructions before every question. New instructions every round."""
    rng = np.random.default_rng((scale.seed, 4, number))
    instructions = rng.integers(0, scale.model.vocab_size, (8, INSTRUCTIONS)).tolist()
    requests = [
        _request(rng, scale, int(adapter), rng.integers(8, 33), 12) for adapter in rng.integers(0, 8, scale.requests)
    ]
    return [_continued(instructions[int(request.adapter or 0)], request) for request in requests]


def conversations(scale: Scale, number: int, rate: float | None = None) -> Workload:
    """Conversations of Zipf-distributed popularity, two of them under each adapter. A turn's prompt is that of the
    turn before and some more; what was answered is no part of it, so that all sides get the same requests. After
    `TURNS` the conversation starts anew. They go on from round to round."""
    rng = np.random.default_rng((scale.seed, 5))
    popularity = 1 / np.arange(1, CONVERSATIONS + 1) ** ZIPF
    chosen = rng.choice(CONVERSATIONS, (scale.rounds + 1, scale.requests), p=popularity / popularity.sum())
    turns = np.zeros(CONVERSATIONS, int)
    requests: list[WorkloadRequest] = []
    for place, conversation in enumerate(chosen[: number + 1].ravel().tolist()):
        generation, turn = divmod(int(turns[conversation]), TURNS)
        turns[conversation] += 1
        if place >= number * scale.requests:
            words = np.random.default_rng((scale.seed, 6, conversation, generation))
            prompt = words.integers(0, scale.model.vocab_size, TURN * TURNS)[: TURN * (turn + 1)].tolist()
            requests.append(WorkloadRequest(0.0, tuple(prompt), f"{conversation // 2}", 12))
    return requests


def _request(
    rng: np.random.Generator,
    scale: Scale,
    adapter: int,
    prompt: int | np.integer[Any],
    output: int,
    arrival: float = 0.0,
) -> WorkloadRequest:
    tokens = rng.integers(0, scale.model.vocab_size, int(prompt)).tolist()
    return WorkloadRequest(arrival, tuple(tokens), f"{adapter}", output)


def _continued(beginning: list[int], request: WorkloadRequest) -> WorkloadRequest:
    return WorkloadRequest(request.arrival, (*beginning, *request.prompt), request.adapter, request.output)
