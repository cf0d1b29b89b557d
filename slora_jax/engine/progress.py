"""What the engine keeps of an unfinished request beside its scheduling: text, logprobs, logits."""

from __future__ import annotations

from typing import Any

import numpy as np

from slora_jax.engine.outputs import Delta, RequestOutput, TokenLogprobs
from slora_jax.engine.runner import InFlight
from slora_jax.engine.sampling import Sampled
from slora_jax.engine.text import TextStream
from slora_jax.models import ModelConfig
from slora_jax.scheduling import FinishReason, Request


class Progress:
    """One request's way from sampled tokens to its output."""

    def __init__(self, request: Request, adapter: str | None, tokenizer: Any, model: ModelConfig) -> None:
        """adapter: the name that the request asked for."""
        params = request.params
        eos_token_ids, self._vocab_size = model.eos_token_ids, model.vocab_size
        self._adapter = adapter
        self.request = request
        self._has_text = tokenizer is not None
        self._text = TextStream(tokenizer, tuple(params.stop or ()), request.prompt)
        self._ends = frozenset(params.stop_token_ids or ()) | frozenset(() if params.ignore_eos else eos_token_ids)
        self._token_times: list[float] = []
        self._logprobs: list[TokenLogprobs] = []
        scored = params.prompt_logprobs is not None
        self._prompt_logprobs: list[TokenLogprobs | None] | None = [None] * len(request.prompt) if scored else None
        self._logits: list[np.ndarray] = []

    def append(self, token: int, step: InFlight, row: int, now: float) -> FinishReason | None:
        """Takes the token that `step` sampled in its sequence `row`, read at `now`. Returns why the request ends with
        it, if it does."""
        request = self.request
        request.output.append(token)
        self._token_times.append(now)
        if request.params.logprobs is not None:
            self._logprobs.append(_logprobs(step.sampled, row, request.params.logprobs))
        if step.logits is not None:
            self._logits.append(np.asarray(step.logits)[row, : self._vocab_size])
        if token in self._ends or self._text.push(token):
            return FinishReason.STOP
        return FinishReason.LENGTH if len(request.output) >= request.max_new else None

    def score(self, position: int, step: InFlight, row: int) -> None:
        """Takes the log-probabilities of the prompt's token at `position` from the sequence `row` of `step`."""
        count = self.request.params.prompt_logprobs
        assert self._prompt_logprobs is not None and count is not None
        self._prompt_logprobs[position] = _logprobs(step.sampled, row, count)

    def delta(self, tokens: list[int]) -> Delta:
        """What the newest tokens bring, while the request goes on."""
        logprobs, of_prompt = self._newest(tokens), self._first(tokens)
        return Delta(self.request.id, tokens, self._text.take(), logprobs=logprobs, prompt_logprobs=of_prompt)

    def end(self, reason: FinishReason) -> FinishReason:
        """No token follows. Returns the reason, which is a stop string if the text's last bytes complete one."""
        self._text.finish()
        return FinishReason.STOP if self._text.stopped and reason is FinishReason.LENGTH else reason

    def last_delta(self, tokens: list[int], error: str | None) -> Delta:
        """The newest tokens and the whole output, of a request that has ended."""
        request = self.request
        assert request.finish_reason is not None
        output = RequestOutput(
            request_id=request.id,
            adapter=self._adapter,
            prompt_token_ids=request.prompt,
            text=self._text.text if self._has_text else None,
            token_ids=request.output,
            finish_reason=request.finish_reason,
            metrics=request.metrics,
            token_times=self._token_times,
            logprobs=None if request.params.logprobs is None else self._logprobs,
            prompt_logprobs=self._prompt_logprobs,
            logits=np.stack(self._logits) if self._logits else None,
            error=error,
        )
        logprobs, of_prompt = self._newest(tokens), self._first(tokens)
        return Delta(request.id, tokens, self._text.take(last=True), output, logprobs, of_prompt)

    def _newest(self, tokens: list[int]) -> list[TokenLogprobs] | None:
        return None if self.request.params.logprobs is None else self._logprobs[len(self._logprobs) - len(tokens) :]

    def _first(self, tokens: list[int]) -> list[TokenLogprobs | None] | None:
        """The prompt's log-probabilities, with the first token."""
        return self._prompt_logprobs if tokens and len(tokens) == len(self.request.output) else None


def _logprobs(sampled: Sampled, row: int, count: int) -> TokenLogprobs:
    ids = np.asarray(sampled.top_token)[row, :count].tolist()
    values = np.asarray(sampled.top_logprob)[row, :count].tolist()
    return TokenLogprobs(float(np.asarray(sampled.logprob)[row]), tuple(zip(ids, values, strict=True)))
