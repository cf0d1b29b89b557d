"""Timing: many dispatches back to back, one wait; rounds of the systems in turn; the median over the rounds."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import jax

from pallas_kernels.bench.case import Dispatch

SLOW = 30
"""Rounds that a dispatch must outlast to be measured once."""


@dataclass(frozen=True)
class Timing:
    """seconds: of one dispatch, median over rounds. rounds: of each round. dispatches: in a round.
    queueing_seconds: what the host took to enqueue one (near `seconds`: the host may be what is measured)."""

    seconds: float
    rounds: tuple[float, ...]
    dispatches: int
    queueing_seconds: float


def time_in_turn(
    dispatches: Mapping[str, Dispatch],
    *,
    rounds: int,
    round_seconds: float,
    begin: Callable[[str], None] = lambda name: None,
) -> dict[str, Timing | Exception]:
    """Times every dispatch function, after a warm-up; a round lasts about `round_seconds` for each. Nothing is
    subtracted. One that raises is left out from then on; its exception is its result. begin: told whose turn it is
    before each warm-up, and "" before the rounds."""
    results: dict[str, Timing | Exception] = {}
    counts: dict[str, int] = {}
    seconds: dict[str, list[float]] = {name: [] for name in dispatches}
    queueing: dict[str, float] = {}
    for name, dispatch in dispatches.items():
        begin(name)
        try:
            jax.block_until_ready(dispatch())  # what the first call does once stays out of the numbers
            estimate, _ = _run(dispatch, 1)
        except Exception as error:  # noqa: BLE001 - one system must not end the benchmark
            results[name] = error
            continue
        counts[name] = max(1, round(round_seconds / max(estimate, 1e-9)))
        if estimate >= SLOW * round_seconds:
            results[name] = Timing(estimate, (estimate,), 1, 0.0)
    begin("")
    for _ in range(rounds):
        for name, dispatch in dispatches.items():
            if name in results:
                continue
            try:
                elapsed, queued = _run(dispatch, counts[name])
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
