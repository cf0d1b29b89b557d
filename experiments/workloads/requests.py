"""A workload as the runners take it: the same requests for the simulator and for real engines."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from experiments.workloads.workload import BASE, INDEPENDENT, Workload
from slora_jax import SamplingParams
from slora_jax.simulation import SimulatedRequest


@dataclass(frozen=True)
class WorkloadRequest:
    """A request for an engine, PEFT or a server, which always generates `output` tokens.

    Attributes:
      arrival: seconds from the start; with `after`, seconds after the end of that request, finished or aborted.
      prompt: token ids.
      adapter: its name; None: the base model.
      output: tokens to generate.
      after: the number of an earlier request (a closed loop); None: the request arrives at its own time.
      temperature, top_p, seed: as in `SamplingParams`; temperature 0 is greedy.
    """

    arrival: float
    prompt: tuple[int, ...]
    adapter: str | None
    output: int
    after: int | None = None
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int | None = None

    def params(self) -> SamplingParams:
        """Returns the request's sampling parameters for an engine."""
        return SamplingParams(
            max_tokens=self.output, temperature=self.temperature, top_p=self.top_p, seed=self.seed, ignore_eos=True
        )

    def body(self, model: str | None = None) -> dict[str, Any]:
        """Returns the JSON of a streamed POST /v1/completions. model: its name at the server; None: the adapter's."""
        return {
            "model": model or self.adapter, "prompt": self.prompt, "max_tokens": self.output,
            "temperature": self.temperature, "top_p": self.top_p, "seed": self.seed, "ignore_eos": True,
            "stream": True, "return_token_ids": True,
        }  # fmt: skip


def write_requests(path: Path, requests: Sequence[WorkloadRequest]) -> None:
    """Writes requests as JSON, one a line."""
    path.write_text("".join(json.dumps(asdict(request)) + "\n" for request in requests))


def read_requests(path: Path) -> list[WorkloadRequest]:
    """Reads what `write_requests` wrote."""
    fields = map(json.loads, path.read_text().splitlines())
    return [WorkloadRequest(**(one | {"prompt": tuple(one["prompt"])})) for one in fields]


OF_TEXTS, OF_REQUESTS = 0, 1
"""Owners of a stream of token ids; with a number and the seed, one of these is the stream's seed."""


def simulated_requests(workload: Workload) -> list[SimulatedRequest]:
    """Returns the requests for `slora_jax.simulation.simulate`, which also takes `workload.ranks`."""
    texts, lengths = _prefixes(workload)
    return [
        SimulatedRequest(
            arrival,
            None if adapter == BASE else adapter,
            prompt,
            output,
            prefix=(text, length) if length else None,
            after=None if after == INDEPENDENT else after,
        )
        for arrival, adapter, prompt, output, after, text, length in zip(
            *_columns(workload), texts.tolist(), lengths.tolist(), strict=True
        )
    ]


def engine_requests(workload: Workload, vocab_size: int, seed: int = 42) -> list[WorkloadRequest]:
    """Returns the requests for `experiments.systems`.

    An adapter's name is its index as text, as in the simulator's records. Token ids are uniform below `vocab_size`;
    those of a text or of a request depend on its number and the seed alone. A request with a prompt of its own keeps
    it.
    """
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
            after=None if after == INDEPENDENT else after,
        )
        for number, (arrival, adapter, prompt, output, after, text, length) in enumerate(
            zip(*_columns(workload), texts.tolist(), lengths.tolist(), strict=True)
        )
    ]


def _columns(workload: Workload) -> list[list[float]]:
    """Arrival, adapter, prompt and output tokens, and what each request follows."""
    after = np.full(len(workload), INDEPENDENT) if workload.after is None else workload.after
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
