"""The paper's transform of a real log of many models to requests for many adapters (section 7.3; S-LoRA
benchmarks/trace.py).

Its log, of LMSYS Chatbot Arena, was not released; `arena_like` imitates it. Any log serves: CSV or JSON lines with the
fields time (seconds, or a date and time), model, prompt_tokens, output_tokens.

Where text and code differ, this is the text: adapters take the ranks in turn (code: a random rank for each, unseeded),
and all long requests are dropped (code: it does not look at the one after each that it drops).
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from experiments.workloads.arguments import check_arguments, ranks_in_turn
from experiments.workloads.log import LogError, read_log, rescaled
from experiments.workloads.workload import BASE, Workload

COLUMNS = ("time", "model", "prompt_tokens", "output_tokens")


def real_trace(
    *,
    num_adapters: int | None,
    ranks: Sequence[int],
    rate: float,
    duration: float,
    seed: int = 42,
    path: str | Path,
    longest: int = 512,
) -> Workload:
    """`int(rate * duration)` requests, sampled from the log without replacement among those of 1 to `longest - 1`
    tokens either way, in order of time, which is rescaled linearly to [0, duration].

    num_adapters: None gives each model of the sample an adapter, in order of their first requests in it; with fewer
    adapters than models these are dealt to them in turn; 0 sends all to the base model. ranks: which the adapters take
    in turn.

    Raises:
      ConfigError: a field is out of range. OSError: the file cannot be read. LogError: it is malformed, or has too few
      requests; the message names the line.
    """
    check_arguments(
        "real_trace",
        num_adapters=1 if num_adapters is None else num_adapters,
        ranks=ranks,
        rate=rate,
        duration=duration,
        longest=longest,
    )
    file, requests = Path(path), int(rate * duration)
    log = [
        (row.time("time"), row.text("model"), row.tokens("prompt_tokens"), row.tokens("output_tokens"))
        for row in read_log(file, COLUMNS)
    ]
    order = np.random.RandomState(seed).permutation(len(log)).tolist()  # the paper's draw: the first 2 R D of it
    fit = [log[i] for i in order if 0 < log[i][2] < longest and 0 < log[i][3] < longest]
    if len(fit) < max(requests, 1):
        raise LogError(
            f"{file}: {len(fit)} requests of 1 to {longest - 1} tokens, of rate x duration = {requests} wanted; lower "
            "them, or raise longest"
        )
    sample = sorted(fit[:requests], key=lambda request: request[0])
    times, models, prompts, outputs = zip(*sample, strict=True)
    numbers = {model: number for number, model in enumerate(dict.fromkeys(models))}
    adapters = len(numbers) if num_adapters is None else num_adapters
    adapter = [numbers[model] % adapters if adapters else BASE for model in models]
    return Workload(
        arrival=rescaled(file, times, duration),
        adapter=np.array(adapter),
        prompt_tokens=np.array(prompts),
        output_tokens=np.array(outputs),
        ranks=ranks_in_turn(adapters, ranks),
    )
