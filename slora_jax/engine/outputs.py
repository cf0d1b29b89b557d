"""The engine's results."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from slora_jax.errors import RequestError
from slora_jax.metrics import Counters, FinishReason, PoolPages, RequestRecord
from slora_jax.scheduling import RequestMetrics

Prompt = str | Sequence[int] | np.ndarray | Mapping[str, Any]
"""A string; token ids in a list or an integer array (NumPy, torch or JAX); or a mapping with `input_ids`, as tokenizers
return."""


@dataclass(frozen=True)
class TokenLogprobs:
    """Log-probabilities at one position, under the model's distribution before temperature and masks.

    Attributes:
      logprob: log-probability of the chosen token.
      top: the most likely tokens as `(token, logprob)`, best first, as many as requested.
    """

    logprob: float
    top: tuple[tuple[int, float], ...]


@dataclass(frozen=True)
class RequestOutput:
    """A finished request.

    Attributes:
      adapter: name of the adapter, None for the base model.
      text: generated text; None without a tokenizer.
      token_ids: generated tokens, including a stop token.
      metrics: times in seconds on the engine's clock.
      token_times: time at which the host read each token, seconds on the engine's clock.
      logprobs: one entry per generated token, if requested.
      prompt_logprobs: one entry per prompt token, if requested; None for the first token.
      prompt_embedding: float32 `[d]`, if requested; not normalized.
      logits: float32 `[len(token_ids), vocab]` with `EngineConfig.keep_logits`.
      error: the reason when `finish_reason` is "error" or "abort".
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
    prompt_embedding: np.ndarray | None = None
    logits: np.ndarray | None = None
    error: str | None = None

    def record(self) -> RequestRecord:
        """Returns the record that `slora_jax.metrics` reads."""
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


def embeddings(outputs: Sequence[RequestOutput], normalize: bool) -> np.ndarray:
    """Returns the prompt embeddings of outputs that have one, float32 `[n, d]`.

    Args:
      normalize: whether each embedding is divided by its length.

    Raises:
      RequestError: a request failed.
    """
    found = []
    for output in outputs:
        if output.prompt_embedding is None:
            reason = output.error or output.finish_reason
            raise RequestError(f"request {output.request_id!r} has no embedding: {reason}")
        found.append(output.prompt_embedding)
    vectors = np.stack(found)
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True) if normalize else vectors


@dataclass(slots=True)  # one per token; a frozen dataclass would take three times as long to make
class Delta:
    """The result of a step for one request.

    Attributes:
      token_ids: new tokens.
      text: new text that no later token can change.
      output: the whole output, with the last tokens.
      logprobs: one entry per new token, if requested.
      prompt_logprobs: as in `RequestOutput`, with the first token.
    """

    request_id: str
    token_ids: list[int]
    text: str
    output: RequestOutput | None = None
    logprobs: list[TokenLogprobs] | None = None
    prompt_logprobs: list[TokenLogprobs | None] | None = None

    def add(self, later: Delta) -> None:
        """Appends the result of the request's next step."""
        self.token_ids += later.token_ids
        self.text += later.text
        self.output = later.output
        if self.logprobs is None:
            self.logprobs = later.logprobs
        elif later.logprobs is not None:
            self.logprobs += later.logprobs
        self.prompt_logprobs = self.prompt_logprobs or later.prompt_logprobs

    @property
    def finish_reason(self) -> FinishReason | None:
        return None if self.output is None else self.output.finish_reason


@dataclass(kw_only=True)
class EngineStats(Counters):
    """Counters since the engine was made, and its current state.

    Attributes:
      running, waiting: number of requests.
      registered_adapters: number of names in the store.
      resident_adapters: number of adapters in the pool.
      pages: pages of the pool by content.
      uploads_in_flight: number of prefetched adapters that have not landed.
      upload_bytes_in_flight: bytes whose copy to the device has started but not landed.
    """

    running: int
    waiting: int
    registered_adapters: int
    resident_adapters: int
    pages: PoolPages
    uploads_in_flight: int
    upload_bytes_in_flight: int
