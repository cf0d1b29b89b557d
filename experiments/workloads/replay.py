"""A log of requests, replayed: every request at its time, for its adapter."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from experiments.workloads.arguments import check_arguments, ranks_in_turn
from experiments.workloads.log import LogError, Row, read_log
from experiments.workloads.workload import BASE, Workload

COLUMNS = ("time", "adapter", "prompt_tokens", "output_tokens")


def replay(
    *,
    num_adapters: int,
    ranks: Sequence[int],
    rate: float,
    duration: float,
    seed: int = 42,
    path: str | Path,
    speed: float = 1.0,
) -> Workload:
    """The requests of a log, in order of time; the first arrives at 0.

    The log is JSON lines or CSV with the fields time (seconds, or a date and time), adapter (a name; null or empty: the
    base model), prompt_tokens (their number or, in JSON lines, their ids) and output_tokens (their number).

    Args:
      num_adapters: registered, if more than the log names; 0 sends all requests to the base model.
      ranks: the adapters take them in turn, in order of their first requests.
      rate, duration: not used: the log has its own.
      path: of the log.
      speed: by which times are divided.

    Raises:
      ConfigError: a field is out of range. OSError: the file cannot be read. LogError: it is malformed or empty; the
      message names the line.
    """
    check_arguments("replay", num_adapters=num_adapters, ranks=ranks, rate=rate, duration=duration, speed=speed)
    rows = sorted(
        (
            (row.time("time"), row.text("adapter") if row.fields["adapter"] else "", _prompt(row), _output(row))
            for row in read_log(Path(path), COLUMNS)
        ),
        key=lambda row: row[0],
    )
    if not rows:
        raise LogError(f"{path}: has no requests")
    times, adapters, prompts, outputs = zip(*rows, strict=True)
    names = list(dict.fromkeys(name for name in adapters if name and num_adapters))
    number = {name: i for i, name in enumerate(names)}
    names += [f"{i}" for i in range(len(names), num_adapters)]
    return Workload(
        arrival=(np.array(times) - times[0]) / speed,
        adapter=np.array([number.get(name, BASE) for name in adapters]),
        prompt_tokens=np.array([prompt if isinstance(prompt, int) else len(prompt) for prompt in prompts]),
        output_tokens=np.array(outputs),
        ranks=ranks_in_turn(len(names), ranks),
        names=tuple(names),
        prompts=tuple(None if isinstance(prompt, int) else prompt for prompt in prompts),
    )


def _prompt(row: Row) -> int | tuple[int, ...]:
    """Raises LogError unless there is one token at least."""
    value = row.fields["prompt_tokens"]
    if isinstance(value, list):
        if not value or not all(
            isinstance(token, int) and not isinstance(token, bool) and token >= 0 for token in value
        ):
            raise row.error("prompt_tokens", "must be a number of tokens, or a list of token ids")
        return tuple(value)
    return row.tokens("prompt_tokens") or _none(row, "prompt_tokens")


def _output(row: Row) -> int:
    return row.tokens("output_tokens") or _none(row, "output_tokens")


def _none(row: Row, field: str) -> int:
    raise row.error(field, "must be at least 1")
