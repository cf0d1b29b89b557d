"""What the engine returns."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from slora_jax.scheduling import FinishReason, RequestMetrics

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


@dataclass(frozen=True)
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


@dataclass(frozen=True)
class EngineStats:
    """Counters since the engine was made, and the state now.

    aborts: requests that the policy gave up before their first token.
    adapter_loads: adapters given pages in the pool. adapter_hits: uses that found theirs still there from before.
    prefetch_hits: adapters brought ahead that had landed by the time their first request could start.
    prefetches_wasted: brought ahead, and evicted or wanted by nobody any more before any use.
    uploads_in_flight: adapters whose copy to the device is under way; upload_bytes_in_flight: begun and not landed;
    upload_bytes: copied to the device in all.
    adapter_merges: times that an adapter was merged into the weights (`lora="merge"`).
    prompt_tokens: known of requests when they were admitted (their prompts; after a preemption, their output too);
    `prefix_hit_tokens` of them were in the prefix cache, the others are among `tokens_computed`.
    pages: pool pages by kind: "free", "kv" (running requests' own), "prefix" (the prefix cache's, whether requests use
    them or not), "adapter"; `idle_prefix_pages` and `idle_adapter_pages` of these may be evicted.
    host_seconds: CPU time of the calling thread for planning, packing and handing out tokens, over all steps.
    launch_seconds: its CPU time in the calls that hand uploads and steps to the device.
    """

    steps: int
    tokens_computed: int
    tokens_generated: int
    preemptions: int
    aborts: int
    prompt_tokens: int
    prefix_hit_tokens: int
    prefix_evictions: int
    adapter_loads: int
    adapter_evictions: int
    adapter_hits: int
    prefetch_hits: int
    prefetches_wasted: int
    uploads_in_flight: int
    upload_bytes_in_flight: int
    upload_bytes: int
    adapter_merges: int
    resident_adapters: int
    registered_adapters: int
    running: int
    waiting: int
    pages: dict[str, int]
    idle_prefix_pages: int
    idle_adapter_pages: int
    host_seconds: float
    launch_seconds: float
