"""Health of the engine, and the errors of requests that it does not accept."""

from __future__ import annotations

from enum import StrEnum
from typing import Protocol

from slora_jax.engine import RequestOutput
from slora_jax.serving.http.errors import ApiError, stopping, unavailable


class Health(StrEnum):
    """Health of the engine. Requests are accepted while it is READY."""

    STARTING = "starting"
    """Loading, compiling, warming up."""
    READY = "ready"
    RECOVERING = "recovering"
    """A step failed, and with it its requests; waiting requests continue. When the engine is idle, a probe generation
    decides between READY and DEAD."""
    STALLED = "stalled"
    """A call of the engine does not return. All requests have failed."""
    STOPPED = "stopped"
    DEAD = "dead"
    """The engine is unusable. The process should be restarted."""


class Listener(Protocol):
    """Callbacks of the loop, in the event loop."""

    def finished(self, output: RequestOutput) -> None:
        """A sequence has ended, for whatever reason."""

    def health_changed(self, health: Health) -> None:
        """The engine's health has changed."""

    def fault(self, error: BaseException) -> None:
        """The engine failed."""


UNAVAILABLE = (Health.STALLED, Health.STOPPED, Health.DEAD)
"""States in which commands are refused: they would never run, or only after a stalled call returns."""


def refusal(health: Health, error: BaseException | None) -> ApiError:
    """Returns the error of a request that is not accepted.

    Args:
      error: the engine's last fault.
    """
    reasons = {
        Health.STARTING: ("starting", "the engine is starting; /ready tells when it is ready", 5),
        Health.RECOVERING: ("recovering", f"the engine recovers from {error!r}", 1),
        Health.STALLED: ("stalled", "a call of the engine does not return", 30),
        Health.DEAD: ("dead", f"the engine is dead: {error!r}", None),
    }
    if health not in reasons:
        return stopping()
    code, message, seconds = reasons[health]
    return unavailable(message, code=code, retry_after=seconds)
