"""What the metrics know of a request that has ended."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

import numpy as np

from slora_jax.errors import MetricsError


class FinishReason(StrEnum):
    """Why a request ended."""

    STOP = "stop"
    """An end-of-sequence or stop token, or a stop string."""
    LENGTH = "length"
    """`max_tokens` or the engine's `max_model_len` was reached."""
    CANCELLED = "cancelled"
    ABORT = "abort"
    """The policy ended it before its first token; the reason is in the output's `error`."""
    ERROR = "error"
    """The request's adapter could not be read back from disk, its step could not be dispatched, or its logits are not
    finite."""


COMPLETED = frozenset({FinishReason.STOP, FinishReason.LENGTH})
"""Reasons with which a request was answered in full. Any other counts as aborted, whoever ended it."""


@dataclass(frozen=True)
class RequestRecord:
    """A request that has ended. Times are seconds on one clock, any origin.

    admitted: when it first left the queue; first_token: when the host had its first token; None if that never was.
    token_times: when the host had each token, in order; empty if not recorded. cached_tokens: of the prompt, found in
    the prefix cache. The paper measures at the HTTP client,
    these are the engine's times.
    """

    request_id: str
    adapter: str | None
    prompt_tokens: int
    output_tokens: int
    finish_reason: FinishReason
    arrival: float
    finished: float
    admitted: float | None = None
    first_token: float | None = None
    token_times: tuple[float, ...] = ()
    cached_tokens: int = 0

    def __post_init__(self) -> None:
        if self.completed and self.first_token is None:
            raise MetricsError(f"request {self.request_id!r} ended with {self.finish_reason}, but has no first token")

    @property
    def completed(self) -> bool:
        """Returns whether it was answered in full; it is aborted otherwise."""
        return self.finish_reason in COMPLETED

    @property
    def latency(self) -> float:
        """Seconds from arrival to the last token (or the abort)."""
        return self.finished - self.arrival

    @property
    def first_token_latency(self) -> float | None:
        """Seconds from arrival to the first token."""
        return None if self.first_token is None else self.first_token - self.arrival

    @property
    def queue_time(self) -> float:
        """Seconds from arrival to the first admission; of one that was never admitted, to its end."""
        return (self.finished if self.admitted is None else self.admitted) - self.arrival

    @property
    def inter_token_latencies(self) -> np.ndarray:
        """Seconds between successive tokens, `[tokens - 1]`; tokens of a preempted request wait for its return."""
        return np.diff(np.asarray(self.token_times, float))
