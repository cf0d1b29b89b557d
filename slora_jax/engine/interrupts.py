"""Ctrl-C between steps, never within one: a step changes books and donated device arrays together."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable
from functools import wraps
from types import FrameType, TracebackType


class InterruptHeld:
    """Holds the first Ctrl-C back until the block has ended; `came` tells whether there was one.

    A second one, from a user who waits for a step that hangs, goes through. Nothing is changed outside the main thread
    and where another handler than Python's own is in charge.
    """

    def __init__(self) -> None:
        self.came = False
        self._active = False

    def __enter__(self) -> InterruptHeld:
        main = threading.current_thread() is threading.main_thread()
        self._active = main and signal.getsignal(signal.SIGINT) is signal.default_int_handler
        if self._active:
            signal.signal(signal.SIGINT, self._hold)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._active:
            signal.signal(signal.SIGINT, signal.default_int_handler)

    def _hold(self, number: int, frame: FrameType | None) -> None:
        if self.came:
            signal.default_int_handler(number, frame)
        self.came = True


def uninterrupted[**P, R](method: Callable[P, R]) -> Callable[P, R]:
    """`method`, in which Ctrl-C takes effect at the end."""

    @wraps(method)
    def run(*args: P.args, **kwargs: P.kwargs) -> R:
        with InterruptHeld() as interrupt:
            result = method(*args, **kwargs)
        if interrupt.came:
            raise KeyboardInterrupt
        return result

    return run
