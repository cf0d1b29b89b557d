"""What the metrics know of a request that has ended."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from slora_jax.errors import MetricsError
from slora_jax.scheduling.request import FinishReason

if TYPE_CHECKING:
    from slora_jax.engine.outputs import RequestOutput

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

    @classmethod
    def of(cls, output: RequestOutput) -> RequestRecord:
        """The record of what an engine returned."""
        metrics = output.metrics
        assert metrics.finished is not None
        return cls(
            request_id=output.request_id,
            adapter=output.adapter,
            prompt_tokens=len(output.prompt_token_ids),
            output_tokens=len(output.token_ids),
            finish_reason=output.finish_reason,
            arrival=metrics.arrival,
            finished=metrics.finished,
            admitted=metrics.admitted,
            first_token=metrics.first_token,
            token_times=tuple(output.token_times),
            cached_tokens=metrics.cached_tokens,
        )

    @property
    def completed(self) -> bool:
        """Whether it was answered in full; it is aborted otherwise."""
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
