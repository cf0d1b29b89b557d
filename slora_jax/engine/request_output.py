"""Turns the core's updates into deltas and outputs with text, log-probabilities and logits."""

from __future__ import annotations

from typing import Any

import numpy as np

from slora_jax.engine.core import EngineCore, Update
from slora_jax.engine.device_executor import DispatchedStep
from slora_jax.engine.outputs import Delta, RequestOutput, TokenLogprobs
from slora_jax.engine.sampling import Sampled
from slora_jax.engine.text import TextStream
from slora_jax.metrics import FinishReason
from slora_jax.scheduling import Request


class RequestOutputs:
    """Builds the outputs of unfinished requests, and ends a request when its text contains a stop string."""

    def __init__(self, core: EngineCore[DispatchedStep], tokenizer: Any, vocab_size: int) -> None:
        """Without a `tokenizer`, outputs have no text. `vocab_size` is the number of logits per token to keep."""
        self._core, self._tokenizer, self._vocab_size = core, tokenizer, vocab_size
        self._unfinished: dict[str, _Output] = {}

    def __contains__(self, request_id: str) -> bool:
        return request_id in self._unfinished

    @property
    def ids(self) -> list[str]:
        """Ids of unfinished requests."""
        return list(self._unfinished)

    def open(self, request: Request, adapter: str | None) -> None:
        """Starts the output of a request. `adapter` is the name that it requested."""
        self._unfinished[request.id] = _Output(request, adapter, self._tokenizer, self._vocab_size)

    def delta(self, update: Update[DispatchedStep]) -> Delta | None:
        """Returns the delta of an update, or None if there is nothing to report yet."""
        request = update.request
        output = self._unfinished.get(request.id)
        if output is None or output.request is not request:
            return None  # it ended with an earlier update of the same step
        if update.token is not None:
            tokens = [update.token]
            if output.append(update) and not update.ended:
                self._core.finish(request, FinishReason.STOP, request.token_times[-1])
        elif update.scored:
            output.score(update)
            return None
        elif update.step is not None:
            output.pool(update)
            return None
        else:
            tokens = []
        if request.finish_reason is None:
            return output.delta(tokens)
        del self._unfinished[request.id]
        return output.last_delta(tokens, update.error)

    def fail(self, request: Request, error: Exception) -> Delta | None:
        """Ends a request after `delta` raised `error`. Returns its last delta, or None if it had ended before."""
        output = self._unfinished.get(request.id)
        if output is None or output.request is not request:
            return None
        self._core.finish(request, FinishReason.ERROR)
        request.finish_reason = FinishReason.ERROR
        del self._unfinished[request.id]
        return output.last_delta([], f"the output could not be built: {error!r}", is_whole=False)


class _Output:
    """The output of one unfinished request."""

    def __init__(self, request: Request, adapter: str | None, tokenizer: Any, vocab_size: int) -> None:
        params = request.params
        self._vocab_size = vocab_size
        self._adapter = adapter
        self.request = request
        self._has_text = tokenizer is not None
        self._text = TextStream(tokenizer, tuple(params.stop or ()), request.prompt)
        self._logprobs: list[TokenLogprobs] | None = None if params.logprobs is None else []
        scored = params.prompt_logprobs is not None
        self._prompt_logprobs: list[TokenLogprobs | None] | None = [None] * len(request.prompt) if scored else None
        self._pooled: np.ndarray | None = None  # sum and last of the prompt's hidden states so far, [2, d]
        self._logits: list[np.ndarray] = []

    def append(self, update: Update[DispatchedStep]) -> bool:
        """Adds a new token. Returns whether the text now contains a stop string."""
        request, step, token = self.request, update.step, update.token
        assert step is not None and step.sampled is not None and token is not None
        if self._logprobs is not None:
            assert request.params.logprobs is not None
            self._logprobs.append(_logprobs(step.sampled, update.row, request.params.logprobs))
        if request.params.prompt_embedding is not None and len(request.output) == 1:
            self.pool(update)
        if step.logits is not None:
            self._logits.append(np.asarray(step.logits)[update.row, : self._vocab_size])
        return token not in request.stop_token_ids and self._text.push(token)

    def score(self, update: Update[DispatchedStep]) -> None:
        """Stores the log-probabilities of the prompt token at position `update.scored`."""
        count = self.request.params.prompt_logprobs
        assert self._prompt_logprobs is not None and count is not None
        assert update.step is not None and update.step.sampled is not None
        self._prompt_logprobs[update.scored] = _logprobs(update.step.sampled, update.row, count)

    def pool(self, update: Update[DispatchedStep]) -> None:
        """Adds the hidden states of a chunk of the prompt."""
        step, row = update.step, update.row
        assert step is not None and step.pooled is not None
        new = np.asarray(step.pooled)[:, row]
        if self._pooled is None or step.sequences[row].start == 0:  # a preempted prompt starts again
            self._pooled = new.copy()
        else:
            self._pooled[0] += new[0]
            self._pooled[1] = new[1]

    def _embedding(self) -> np.ndarray | None:
        if self._pooled is None:
            return None
        if self.request.params.prompt_embedding == "last":
            return self._pooled[1]
        return self._pooled[0] / np.float32(len(self.request.prompt))

    def delta(self, tokens: list[int]) -> Delta:
        """Returns the delta of an unfinished request."""
        if self._logprobs is None and self._prompt_logprobs is None:
            return Delta(self.request.id, tokens, self._text.take())
        return Delta(self.request.id, tokens, self._text.take(), None, *self._logprobs_of(tokens))

    def last_delta(self, tokens: list[int], error: str | None, is_whole: bool = True) -> Delta:
        """Returns the last delta of a request that has ended, with its whole output. `is_whole` flushes the bytes of an
        incomplete last character."""
        request = self.request
        if is_whole:
            self._text.finish()
        if self._text.stopped and request.finish_reason is FinishReason.LENGTH:
            request.finish_reason = FinishReason.STOP  # the flushed bytes complete a stop string
        assert request.finish_reason is not None
        output = RequestOutput(
            request_id=request.id,
            adapter=self._adapter,
            prompt_token_ids=request.prompt,
            text=self._text.text if self._has_text else None,
            token_ids=request.output,
            finish_reason=request.finish_reason,
            metrics=request.metrics,
            token_times=request.token_times,
            logprobs=self._logprobs,
            prompt_logprobs=self._prompt_logprobs,
            prompt_embedding=self._embedding(),
            logits=np.stack(self._logits) if self._logits else None,
            error=error,
        )
        return Delta(request.id, tokens, self._text.take(last=True), output, *self._logprobs_of(tokens))

    def _logprobs_of(self, tokens: list[int]) -> tuple[list[TokenLogprobs] | None, list[TokenLogprobs | None] | None]:
        """Returns the log-probabilities of the newest tokens and, with the first token, of the prompt."""
        newest = None if self._logprobs is None else self._logprobs[len(self._logprobs) - len(tokens) :]
        if self._prompt_logprobs is None or not tokens or len(tokens) < len(self.request.output):
            return newest, None
        return newest, self._prompt_logprobs


def _logprobs(sampled: Sampled, row: int, count: int) -> TokenLogprobs:
    ids = np.asarray(sampled.top_token)[row, :count].tolist()
    values = np.asarray(sampled.top_logprob)[row, :count].tolist()
    return TokenLogprobs(float(np.asarray(sampled.logprob)[row]), tuple(zip(ids, values, strict=True)))
