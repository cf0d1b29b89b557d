"""Timing: many dispatches and one wait per round, the systems' rounds interleaved, the median of the rounds."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import jax

from pallas_kernels.bench.case import Dispatch

SLOW = 30
"""A dispatch that takes at least this many rounds is measured once."""


@dataclass(frozen=True)
class Timing:
    """Times of one dispatch.

    Attributes:
      seconds: median of the rounds.
      rounds: seconds of each round.
      dispatches: number in a round.
      queueing_seconds: time to enqueue one. If it is near `seconds`, the host may be the bottleneck.
    """

    seconds: float
    rounds: tuple[float, ...]
    dispatches: int
    queueing_seconds: float


def time_in_turn(
    dispatches: Mapping[str, Dispatch],
    *,
    rounds: int,
    round_seconds: float,
    watched: Callable[[str], AbstractContextManager] = nullcontext,
) -> dict[str, Timing | Exception]:
    """Times every dispatch function after a warm-up, one round of each in turn.

    Args:
      rounds: number of rounds.
      round_seconds: wanted length of a round.
      watched: context of each warm-up, by name, and of the rounds ("").

    Returns:
      A timing by name, or the exception of a function that raised, which is left out from then on.
    """
    results: dict[str, Timing | Exception] = {}
    counts: dict[str, int] = {}
    seconds: dict[str, list[float]] = {name: [] for name in dispatches}
    queueing: dict[str, float] = {}
    for name, dispatch in dispatches.items():
        try:
            with watched(name):
                jax.block_until_ready(dispatch())  # what only the first call does is not timed
                estimate, _ = _run(dispatch, 1)
        except Exception as error:  # noqa: BLE001 - one system must not end the benchmark
            results[name] = error
            continue
        counts[name] = max(1, round(round_seconds / max(estimate, 1e-9)))
        if estimate >= SLOW * round_seconds:
            results[name] = Timing(estimate, (estimate,), 1, 0.0)
    with watched(""):
        for _ in range(rounds):
            for name in [name for name in dispatches if name not in results]:
                try:
                    elapsed, queued = _run(dispatches[name], counts[name])
                except Exception as error:  # noqa: BLE001 - see above
                    results[name] = error
                    continue
                seconds[name].append(elapsed / counts[name])
                queueing[name] = queued / counts[name]
    for name, measured in seconds.items():
        if name not in results:
            results[name] = Timing(statistics.median(measured), tuple(measured), counts[name], queueing[name])
    return results


def _run(dispatch: Dispatch, count: int) -> tuple[float, float]:
    """Seconds until `count` dispatches are done, and until they are enqueued."""
    start = time.perf_counter()
    for _ in range(count):
        out = dispatch()
    queued = time.perf_counter() - start
    jax.block_until_ready(out)
    return time.perf_counter() - start, queued
