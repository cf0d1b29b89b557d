"""A workload as the runners take it: the same requests for the simulator and for real engines."""

from __future__ import annotations

import numpy as np

from experiments.systems.workload import WorkloadRequest
from experiments.workloads.workload import BASE, NOBODY, Workload
from slora_jax.simulation import SimulatedRequest

OF_TEXTS, OF_REQUESTS = 0, 1
"""What a stream of token ids belongs to; with a number and the seed, it is the stream's own seed."""


def simulated_requests(workload: Workload) -> list[SimulatedRequest]:
    """For `slora_jax.simulation.simulate`, with `workload.ranks`."""
    texts, lengths = _prefixes(workload)
    return [
        SimulatedRequest(
            arrival,
            None if adapter == BASE else adapter,
            prompt,
            output,
            prefix=(text, length) if length else None,
            after=None if after == NOBODY else after,
        )
        for arrival, adapter, prompt, output, after, text, length in zip(
            *_columns(workload), texts.tolist(), lengths.tolist(), strict=True
        )
    ]


def engine_requests(workload: Workload, vocab_size: int, seed: int = 42) -> list[WorkloadRequest]:
    """For `experiments.systems`: adapters are named by their indices as text, as in the simulator's records, and token
    ids, of texts and of every request, drawn uniformly below `vocab_size`. Deterministic: the number of a text or of a
    request and the seed decide its tokens, whatever else is in the workload. A request with a prompt of its own has
    that."""
    texts, lengths = _prefixes(workload)
    longest: dict[int, int] = {}
    for text, length in zip(texts.tolist(), lengths.tolist(), strict=True):
        longest[text] = max(longest.get(text, 0), length)
    given = workload.prompts or [None] * len(workload)
    tokens_of = {text: _tokens((seed, OF_TEXTS, text), length, vocab_size) for text, length in longest.items()}
    return [
        WorkloadRequest(
            arrival,
            given[number]
            or (*tokens_of[text][:length], *_tokens((seed, OF_REQUESTS, number), prompt - length, vocab_size)),
            None if adapter == BASE else f"{adapter}",
            output,
            after=None if after == NOBODY else after,
        )
        for number, (arrival, adapter, prompt, output, after, text, length) in enumerate(
            zip(*_columns(workload), texts.tolist(), lengths.tolist(), strict=True)
        )
    ]


def _columns(workload: Workload) -> list[list[float]]:
    """Arrival, adapter, prompt and output tokens, and what each request follows."""
    after = np.full(len(workload), NOBODY) if workload.after is None else workload.after
    arrays = (workload.arrival, workload.adapter, workload.prompt_tokens, workload.output_tokens, after)
    return [array.tolist() for array in arrays]


def _prefixes(workload: Workload) -> tuple[np.ndarray, np.ndarray]:
    """Texts and lengths; text 0 of length 0 where there is none."""
    none = np.zeros(len(workload), int)
    if workload.prefix_text is None or workload.prefix_tokens is None:
        return none, none
    return workload.prefix_text, workload.prefix_tokens


def _tokens(seed: tuple[int, int, int], count: int, vocab_size: int) -> list[int]:
    return np.random.default_rng(seed).integers(0, vocab_size, count).tolist()
