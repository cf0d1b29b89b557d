"""Record of a finished request, the input of the metrics."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

import numpy as np

from slora_jax.errors import MetricsError


class FinishReason(StrEnum):
    """Reason why a request ended."""

    STOP = "stop"
    """An end-of-sequence or stop token, or a stop string."""
    LENGTH = "length"
    """`max_tokens` or the engine's `max_model_len` was reached."""
    CANCELLED = "cancelled"
    ABORT = "abort"
    """The policy aborted it before its first token; the output's `error` has the reason."""
    ERROR = "error"
    """Its adapter could not be read from disk, its step could not be dispatched, or its logits are not finite."""


COMPLETED = frozenset({FinishReason.STOP, FinishReason.LENGTH})
"""Reasons of completed requests. Requests with any other reason count as aborted."""


@dataclass(frozen=True)
class RequestRecord:
    """A finished request. Times are seconds on one clock of the engine; the paper measures at the HTTP client.

    Attributes:
      prompt_tokens, output_tokens: number of tokens.
      arrival, finished: times of arrival and end.
      admitted: time of the first admission; None if it was never admitted.
      first_token: time at which the host read the first token; None without one.
      token_times: time at which the host read each token, in order; empty if not recorded.
      cached_tokens: prompt tokens found in the prefix cache.
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
        """True if the request completed, False if it counts as aborted."""
        return self.finish_reason in COMPLETED

    @property
    def latency(self) -> float:
        """Seconds from arrival to the end."""
        return self.finished - self.arrival

    @property
    def first_token_latency(self) -> float | None:
        """Seconds from arrival to the first token, or None."""
        return None if self.first_token is None else self.first_token - self.arrival

    @property
    def queue_time(self) -> float:
        """Seconds from arrival to the first admission, or to the end if it was never admitted."""
        return (self.finished if self.admitted is None else self.admitted) - self.arrival

    @property
    def inter_token_latencies(self) -> np.ndarray:
        """Seconds between successive tokens, float64 `[tokens - 1]`, including any time spent preempted."""
        return np.diff(np.asarray(self.token_times, float))
