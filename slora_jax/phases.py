"""Durations of the phases of a start: imports, tokenizer, weights, programs. Free while no observer is set."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

Observer = Callable[[str, float], None]
"""Called at the end of a phase with its name and its duration in seconds."""

_imported = time.monotonic()
_observer: Observer | None = None
_now: str | None = None
_done: tuple[int, int] | None = None


def now() -> tuple[str | None, tuple[int, int] | None]:
    """The current phase (None between phases) and its progress as (parts done, parts in total) where known."""
    return _now, _done


def advance(done: int, total: int) -> None:
    """Sets the progress of the current phase to `done` of `total` parts."""
    global _done
    _done = (done, total)


def observe(observer: Observer | None) -> None:
    """Calls `observer` at the end of every later phase, on that phase's thread; None removes the observer."""
    global _observer
    _observer = observer


@contextmanager
def phase(name: str) -> Iterator[None]:
    """Times the block as a phase of the start. A block that raises is not reported."""
    global _now, _done
    start = time.monotonic()
    _now, _done = name, None
    try:
        yield
    finally:
        _now = _done = None
    report(name, time.monotonic() - start)


def report(name: str, seconds: float) -> None:
    """Reports a phase that the caller timed."""
    if _observer is not None:
        _observer(name, seconds)


def seconds_since_start() -> float:
    """Seconds since this process started, to 0.01 s; without /proc, since this module was imported."""
    since_import = time.monotonic() - _imported
    try:
        with open("/proc/self/stat") as stat, open("/proc/uptime") as uptime:
            ticks = int(stat.read().rpartition(")")[2].split()[19])  # field 22: start time after boot
            since_start = float(uptime.read().split()[0]) - ticks / os.sysconf("SC_CLK_TCK")
    except (OSError, ValueError, IndexError):
        return since_import
    return max(since_import, since_start)
