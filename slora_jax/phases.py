"""How long the parts of a start take: imports, tokenizer, weights, programs. Free while nothing observes them."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

Observer = Callable[[str, float], None]
"""Gets the name of a phase that has ended, and its seconds."""

_imported = time.monotonic()
_observer: Observer | None = None
_now: str | None = None
_done: tuple[int, int] | None = None


def now() -> tuple[str | None, tuple[int, int] | None]:
    """The phase under way, None between two, and how many of its parts are done of how many, where that is known."""
    return _now, _done


def advance(done: int, total: int) -> None:
    """The phase under way has `done` parts of `total`."""
    global _done
    _done = (done, total)


def observe(observer: Observer | None) -> None:
    """Calls `observer` at the end of each phase from now on, on the phase's thread; None: nothing is called."""
    global _observer
    _observer = observer


@contextmanager
def phase(name: str) -> Iterator[None]:
    """The block is a phase of the start; one that raises is not reported."""
    global _now, _done
    start = time.monotonic()
    _now, _done = name, None
    try:
        yield
    finally:
        _now = _done = None
    report(name, time.monotonic() - start)


def report(name: str, seconds: float) -> None:
    """Reports a phase that was measured otherwise."""
    if _observer is not None:
        _observer(name, seconds)


def seconds_since_start() -> float:
    """Seconds since this process was started, in hundredths; where the system does not tell, since this module was
    imported."""
    since_import = time.monotonic() - _imported
    try:
        with open("/proc/self/stat") as stat, open("/proc/uptime") as uptime:
            ticks = int(stat.read().rpartition(")")[2].split()[19])  # field 22, after the boot
            since_start = float(uptime.read().split()[0]) - ticks / os.sysconf("SC_CLK_TCK")
    except (OSError, ValueError, IndexError):
        return since_import
    return max(since_import, since_start)
