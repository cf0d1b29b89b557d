"""Azure's public traces of LLM inference (2023): CSV with TIMESTAMP, ContextTokens, GeneratedTokens."""

from __future__ import annotations

import csv
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path

import numpy as np

from experiments.workloads.workload import Workload


def azure(
    file: Path,
    num_adapters: int,
    rate: float,
    duration: float,
    ranks: Sequence[int],
    *,
    alpha: float = 1.0,
    longest: int = 2048,
    seed: int = 42,
) -> Workload:
    """The trace's first `int(rate * duration)` requests of fewer than `longest` tokens either way, in time rescaled
    linearly to [0, duration]. The trace knows no adapters: they are drawn as in the paper's synthetic workload.

    Raises:
      FileNotFoundError: no such file. ValueError: too few requests in it.
    """
    requests = int(rate * duration)
    times, prompts, outputs = [], [], []
    with file.open() as rows:
        for row in csv.DictReader(rows):
            prompt, output = int(row["ContextTokens"]), int(row["GeneratedTokens"])
            if 0 < prompt < longest and 0 < output < longest:
                times.append(datetime.fromisoformat(row["TIMESTAMP"][:26]).timestamp())
                prompts.append(prompt)
                outputs.append(output)
            if len(times) == requests:
                break
    if len(times) < requests:
        raise ValueError(f"{file}: {len(times)} requests of fewer than {longest} tokens, of {requests} wanted")
    arrival = np.array(times) - times[0]
    random = np.random.RandomState(seed)
    return Workload(
        arrival=arrival / arrival[-1] * duration,
        adapter=(random.power(alpha, requests) * num_adapters).astype(int),
        prompt_tokens=np.array(prompts),
        output_tokens=np.array(outputs),
        ranks=tuple(ranks[i % len(ranks)] for i in range(num_adapters)),
    )
