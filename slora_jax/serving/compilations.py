"""Counts compilations: a server that compiles while it serves lets everybody wait."""

from __future__ import annotations

import jax

BACKEND_COMPILE = "/jax/core/compile/backend_compile_duration"


class Compilations:
    """Programs that XLA compiled (or loaded from the persistent cache) in this process since this was made.

    Make it before the engine, whose step programs are then counted; after `ready` there should be none.
    """

    def __init__(self) -> None:
        self.total = 0
        self.seconds = 0.0
        self._before_ready: int | None = None
        self._listening = True
        jax.monitoring.register_event_duration_secs_listener(self._listen)

    @property
    def after_ready(self) -> int:
        return 0 if self._before_ready is None else self.total - self._before_ready

    def ready(self) -> None:
        """All is compiled. Only the first call counts."""
        if self._before_ready is None:
            self._before_ready = self.total

    def close(self) -> None:
        """Stops counting. May be called twice."""
        if self._listening:
            self._listening = False
            jax.monitoring.unregister_event_duration_listener(self._listen)

    def _listen(self, event: str, duration_secs: float, **_: str | int) -> None:
        if event == BACKEND_COMPILE:
            self.total += 1
            self.seconds += duration_secs
