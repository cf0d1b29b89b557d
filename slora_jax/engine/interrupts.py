"""Delays Ctrl-C until a step ends, because a step must update host state and donated device arrays together."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable
from functools import wraps
from types import FrameType, TracebackType


class InterruptHeld:
    """Holds back the first Ctrl-C inside the block (`is_pending`). A second one raises at once, in case a step hangs.

    It has no effect outside the main thread, or if another handler than Python's own is installed.
    """

    def __init__(self) -> None:
        self.is_pending = False
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
        if self.is_pending:
            signal.default_int_handler(number, frame)
        self.is_pending = True


def uninterrupted[**P, R](method: Callable[P, R]) -> Callable[P, R]:
    """Decorates a method so that Ctrl-C takes effect after it returns."""

    @wraps(method)
    def run(*args: P.args, **kwargs: P.kwargs) -> R:
        with InterruptHeld() as interrupt:
            result = method(*args, **kwargs)
        if interrupt.is_pending:
            raise KeyboardInterrupt
        return result

    return run
