"""Sampling and stopping parameters of a request."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from slora_jax.errors import ConfigError
from slora_jax.scheduling.structured import StructuredOutputs
from slora_jax.typed import checks_keywords

MAX_LOGPROBS = 20
"""Upper limit of `SamplingParams.logprobs`."""
MAX_LOGIT_BIAS = 300
"""Maximum number of tokens in `SamplingParams.logit_bias`."""


@checks_keywords
@dataclass(frozen=True)
class SamplingParams:
    """Sampling and stopping parameters of one request.

    Attributes:
      max_tokens: maximum number of tokens to generate; None allows as many as `max_model_len` and the pool permit.
      temperature: divisor of the logits; 0 is greedy.
      top_k: keeps the k most likely tokens; 0 keeps all.
      top_p: keeps the smallest set of most likely tokens whose total probability reaches this value.
      min_p: keeps tokens at least this fraction as likely as the most likely one.
      seed: seed of the request's random stream, which does not depend on the rest of the batch. None derives it from
        the engine's seed and the request's number.
      stop: strings that end the generation; excluded from the text.
      stop_token_ids: tokens that end the generation; excluded from the text, included in `token_ids`.
      ignore_eos: whether to continue past the model's end-of-sequence tokens.
      logprobs: None, or the number of alternatives (0 to 20) reported for each token with its own log-probability,
        from the model's distribution before temperature and masks.
      prompt_logprobs: likewise for each prompt token after the first. Such a prompt takes more steps and does not read
        the prefix cache.
      prompt_embedding: pooling of the prompt's hidden states after the final norm into one vector, "mean" over its
        tokens or "last", or None. It needs `EngineConfig.embeddings`. "mean" does not read the prefix cache.
      structured_outputs: form of the text, or None; a mapping is converted to `StructuredOutputs`. The generation ends
        with `finish_reason` "stop" when no token can follow, even with `ignore_eos`.
      logit_bias: numbers in [-100, 100] added to the logits of up to 300 tokens, by token id, or None; kept as pairs.
    """

    max_tokens: int | None = 16
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    seed: int | None = None
    stop: str | tuple[str, ...] | list[str] | None = ()
    stop_token_ids: tuple[int, ...] | list[int] | None = ()
    ignore_eos: bool = False
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    prompt_embedding: str | None = None
    structured_outputs: StructuredOutputs | Mapping[str, Any] | None = None
    logit_bias: Mapping[int, float] | tuple[tuple[int, float], ...] | None = None

    def __post_init__(self) -> None:
        if isinstance(self.stop, str):
            object.__setattr__(self, "stop", (self.stop,))
        for name, allowed in (("stop", "non-empty strings"), ("stop_token_ids", "token ids, integers of at least 0")):
            value = getattr(self, name)
            _require(isinstance(value, list | tuple | None), name, value, f"a list of {allowed}")
            object.__setattr__(self, name, tuple(value or ()))
        _require(
            self.max_tokens is None or (_is_int(self.max_tokens) and self.max_tokens >= 1),
            "max_tokens",
            self.max_tokens,
            "an integer of at least 1, or None",
        )
        _require(_in(self.temperature, 0, 1e4), "temperature", self.temperature, "a finite number of at least 0")
        _require(_is_int(self.top_k) and 0 <= self.top_k < 2**31, "top_k", self.top_k, "0 (off) or a positive integer")
        _require(_in(self.top_p, 0, 1) and self.top_p > 0, "top_p", self.top_p, "in (0, 1]")
        _require(_in(self.min_p, 0, 1), "min_p", self.min_p, "in [0, 1]")
        _require(
            self.seed is None or (_is_int(self.seed) and 0 <= self.seed < 2**32),
            "seed",
            self.seed,
            "an integer in [0, 2**32), or None",
        )
        stop, stop_ids = self.stop or (), self.stop_token_ids or ()
        _require(all(isinstance(s, str) and s for s in stop), "stop", self.stop, "non-empty strings")
        _require(
            all(_is_int(t) and t >= 0 for t in stop_ids),
            "stop_token_ids",
            self.stop_token_ids,
            "token ids, integers of at least 0",
        )
        for name in ("logprobs", "prompt_logprobs"):
            value = getattr(self, name)
            _require(
                value is None or (_is_int(value) and 0 <= value <= MAX_LOGPROBS),
                name,
                value,
                f"None or an integer in [0, {MAX_LOGPROBS}]",
            )
        pooling = self.prompt_embedding
        _require(pooling in (None, "mean", "last"), "prompt_embedding", pooling, "None, 'mean' or 'last'")
        _require(
            pooling is None or self.prompt_logprobs is None, "prompt_embedding", pooling, "None with prompt_logprobs"
        )
        form = self.structured_outputs
        if isinstance(form, Mapping):
            object.__setattr__(self, "structured_outputs", StructuredOutputs(**form))
        else:
            is_form = isinstance(form, StructuredOutputs | None)
            _require(is_form, "structured_outputs", form, "StructuredOutputs, a mapping of its fields, or None")
        self._check_bias()

    def _check_bias(self) -> None:
        given = self.logit_bias
        pairs = tuple(given.items()) if isinstance(given, Mapping) else given or ()
        is_valid = isinstance(pairs, tuple) and all(
            isinstance(pair, tuple) and len(pair) == 2 and _is_int(pair[0]) and pair[0] >= 0 and _in(pair[1], -100, 100)
            for pair in pairs
        )
        allowed = f"at most {MAX_LOGIT_BIAS} numbers in [-100, 100] by token id"
        _require(is_valid and len(pairs) <= MAX_LOGIT_BIAS, "logit_bias", given, allowed)
        object.__setattr__(self, "logit_bias", pairs)


def _is_int(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _in(value: Any, low: float, high: float) -> bool:
    return (
        isinstance(value, (int, float))
        and not isinstance(value, bool)
        and math.isfinite(value)
        and low <= value <= high
    )


def _require(condition: bool, field: str, value: Any, allowed: str) -> None:
    if not condition:
        raise ConfigError(f"SamplingParams.{field}={value!r}: must be {allowed}")
