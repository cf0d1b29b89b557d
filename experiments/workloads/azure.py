"""Azure's public traces of LLM inference (2023, 2024): CSV with TIMESTAMP, ContextTokens, GeneratedTokens
(https://github.com/Azure/AzurePublicDataset)."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from experiments.workloads.arguments import check_arguments, ranks_in_turn
from experiments.workloads.log import LogError, read_log, rescaled
from experiments.workloads.popularity import Popularity, draw_adapters
from experiments.workloads.workload import Workload

COLUMNS = ("TIMESTAMP", "ContextTokens", "GeneratedTokens")


def azure(
    *,
    num_adapters: int,
    ranks: Sequence[int],
    rate: float,
    duration: float,
    seed: int = 42,
    path: str | Path,
    popularity: Popularity = "zipf",
    exponent: float = 1.0,
    alpha: float = 1.0,
    longest: int = 2048,
) -> Workload:
    """The trace's first `int(rate * duration)` requests of 1 to `longest - 1` tokens either way, in time rescaled
    linearly to [0, duration]: successive ones, so that the trace's bursts stay. Lines after them are not read.

    The trace knows no adapters; they are drawn, independently of everything else (`draw_adapters`): popularity "zipf"
    with `exponent`, or "power" with `alpha`.

    Raises:
      ConfigError: a field is out of range. OSError: the file cannot be read. LogError: it is malformed, or has too few
      requests; the message names the line.
    """
    check_arguments("azure", num_adapters=num_adapters, ranks=ranks, rate=rate, duration=duration, longest=longest)
    file, requests = Path(path), int(rate * duration)
    times: list[float] = []
    lengths: list[tuple[int, int]] = []
    before = -np.inf
    for row in read_log(file, COLUMNS):
        if len(times) == requests:
            break
        time, prompt, output = row.time("TIMESTAMP"), row.tokens("ContextTokens"), row.tokens("GeneratedTokens")
        if time < before:
            raise row.error("TIMESTAMP", "is before the line above; the lines must be in order of time")
        before = time
        if 0 < prompt < longest and 0 < output < longest:
            times.append(time)
            lengths.append((prompt, output))
    if len(times) < max(requests, 1):
        raise LogError(
            f"{file}: {len(times)} requests of 1 to {longest - 1} tokens, of rate x duration = {requests} wanted; "
            "lower them, or raise longest"
        )
    prompts, outputs = np.array(lengths).T
    return Workload(
        arrival=rescaled(file, times, duration),
        adapter=draw_adapters(np.random.RandomState(seed), num_adapters, requests, popularity, exponent, alpha),
        prompt_tokens=prompts,
        output_tokens=outputs,
        ranks=ranks_in_turn(num_adapters, ranks),
    )
