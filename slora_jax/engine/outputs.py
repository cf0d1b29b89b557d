"""What the engine returns."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from slora_jax.metrics import Counters, FinishReason, PoolPages, RequestRecord
from slora_jax.scheduling import RequestMetrics

Prompt = str | Sequence[int] | np.ndarray | Mapping[str, Any]
"""A string; token ids, in a list or an integer array (NumPy's, torch's or JAX's); or a mapping with `input_ids`, as
tokenizers return."""


@dataclass(frozen=True)
class TokenLogprobs:
    """Log probabilities under the model's own distribution (before temperature and masks) at one output position.

    `logprob` of the chosen token; `top`: the best alternatives, as many as asked for, `(token, logprob)` best first.
    """

    logprob: float
    top: tuple[tuple[int, float], ...]


@dataclass(frozen=True)
class RequestOutput:
    """A finished request.

    text: generated text, None without a tokenizer. token_ids: generated tokens, a stop token included. logprobs: one
    entry per token, if asked for. prompt_logprobs: one per token of the prompt, if asked for; None for the first, which
    nothing precedes. logits: float32 `[len(token_ids), vocab]` with `EngineConfig.keep_logits`.
    error: why, when `finish_reason` is "error" or "abort". metrics: seconds on the engine's clock; token_times: when
    the host had each token, on the same clock.
    """

    request_id: str
    adapter: str | None
    prompt_token_ids: list[int]
    text: str | None
    token_ids: list[int]
    finish_reason: FinishReason
    metrics: RequestMetrics
    token_times: list[float]
    logprobs: list[TokenLogprobs] | None = None
    prompt_logprobs: list[TokenLogprobs | None] | None = None
    logits: np.ndarray | None = None
    error: str | None = None

    def record(self) -> RequestRecord:
        """The request, as `slora_jax.metrics` takes it."""
        metrics = self.metrics
        assert metrics.finished is not None
        return RequestRecord(
            request_id=self.request_id,
            adapter=self.adapter,
            prompt_tokens=len(self.prompt_token_ids),
            output_tokens=len(self.token_ids),
            finish_reason=self.finish_reason,
            arrival=metrics.arrival,
            finished=metrics.finished,
            admitted=metrics.admitted,
            first_token=metrics.first_token,
            token_times=tuple(self.token_times),
            cached_tokens=metrics.cached_tokens,
        )


@dataclass(slots=True)  # not frozen: there is one for each token, and a frozen one takes three times as long to make
class Delta:
    """The result of a step for one request.

    Attributes:
      token_ids: new tokens. logprobs: theirs, if asked for.
      text: text that no later token can change.
      output: with the last tokens, the whole output.
      prompt_logprobs: with the first token, if asked for.
    """

    request_id: str
    token_ids: list[int]
    text: str
    output: RequestOutput | None = None
    logprobs: list[TokenLogprobs] | None = None
    prompt_logprobs: list[TokenLogprobs | None] | None = None

    @property
    def finish_reason(self) -> FinishReason | None:
        return None if self.output is None else self.output.finish_reason


@dataclass(kw_only=True)
class EngineStats(Counters):
    """Counters since the engine was made, and its state now.

    Attributes:
      running, waiting: requests. registered_adapters: names in the store. resident_adapters: adapters in the pool.
      pages: of the pool, by content.
      uploads_in_flight: prefetched adapters that have not landed; upload_bytes_in_flight: bytes of their copies that
        have begun.
    """

    running: int
    waiting: int
    registered_adapters: int
    resident_adapters: int
    pages: PoolPages
    uploads_in_flight: int
    upload_bytes_in_flight: int
