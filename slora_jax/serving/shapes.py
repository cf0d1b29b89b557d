"""The JSON of answers: OpenAI's objects for completions and for chat, whole and in pieces."""

from __future__ import annotations

import time
import uuid
from collections.abc import Sequence
from typing import Any, Protocol

from slora_jax.engine import RequestOutput
from slora_jax.engine.outputs import TokenLogprobs
from slora_jax.serving.mailbox import Arrived

Json = dict[str, Any]


class TokenText:
    """What a token reads as, by itself."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self._texts: dict[int, str] = {}

    def __call__(self, token: int) -> str:
        text = self._texts.get(token)
        if text is None:
            text = f"token_id:{token}" if self._tokenizer is None else self._tokenizer.decode([token])
            self._texts[token] = text  # at most the vocabulary
        return text


class Shape(Protocol):
    """How an endpoint's answers look. `index` is a choice's."""

    def opening(self, index: int) -> Json | None:
        """A choice's first piece, before anything was generated; None: there is none."""

    def piece(self, index: int, arrived: Arrived) -> Json:
        """What has come of a choice."""

    def choice(self, index: int, whole: Arrived) -> Json:
        """A choice that is complete."""

    def envelope(self, choices: list[Json], *, streamed: bool) -> Json:
        """The object around choices."""


class CompletionShape:
    """Of /v1/completions."""

    def __init__(
        self, model: str, token_text: TokenText, *, logprobs: bool, token_ids: bool, echoes: Sequence[str]
    ) -> None:
        """echoes: by choice, what precedes its text."""
        self._frame = _frame("cmpl", model)
        self._token_text, self._logprobs, self._token_ids, self._echoes = token_text, logprobs, token_ids, echoes
        self._offsets = [len(echo) for echo in echoes]  # of the next token in the choice's text

    def opening(self, index: int) -> Json | None:
        return self._choice(index, self._echoes[index], None, None) if self._echoes[index] else None

    def piece(self, index: int, arrived: Arrived) -> Json:
        choice = self._choice(index, arrived.text, self._values(index, arrived), _finish_reason(arrived.output))
        return choice | _token_ids(self._token_ids, arrived)

    def choice(self, index: int, whole: Arrived) -> Json:
        return self.piece(index, whole) | {"text": self._echoes[index] + whole.text}

    def envelope(self, choices: list[Json], *, streamed: bool) -> Json:
        return {**self._frame, "object": "text_completion", "choices": choices}

    def _choice(self, index: int, text: str, logprobs: Json | None, finish_reason: str | None) -> Json:
        return {"index": index, "text": text, "logprobs": logprobs, "finish_reason": finish_reason}

    def _values(self, index: int, arrived: Arrived) -> Json | None:
        if not self._logprobs:
            return None
        tokens = [self._token_text(token) for token in arrived.token_ids]
        offsets = []
        for token in tokens:
            offsets.append(self._offsets[index])
            self._offsets[index] += len(token)
        return {
            "tokens": tokens,
            "token_logprobs": [one.logprob for one in arrived.logprobs],
            "top_logprobs": [
                {self._token_text(token): value for token, value in reversed(one.top)} for one in arrived.logprobs
            ],
            "text_offset": offsets,
        }


class ChatShape:
    """Of /v1/chat/completions."""

    def __init__(self, model: str, token_text: TokenText, *, logprobs: bool, token_ids: bool) -> None:
        self._frame = _frame("chatcmpl", model)
        self._token_text, self._logprobs, self._token_ids = token_text, logprobs, token_ids

    def opening(self, index: int) -> Json | None:
        return {"index": index, "delta": {"role": "assistant", "content": ""}, "logprobs": None, "finish_reason": None}

    def piece(self, index: int, arrived: Arrived) -> Json:
        delta = {"content": arrived.text} if arrived.text or arrived.output is None else {}
        return {"index": index, "delta": delta, **self._rest(arrived)}

    def choice(self, index: int, whole: Arrived) -> Json:
        message = {"role": "assistant", "content": whole.text, "refusal": None}
        return {"index": index, "message": message, **self._rest(whole)}

    def envelope(self, choices: list[Json], *, streamed: bool) -> Json:
        kind = "chat.completion.chunk" if streamed else "chat.completion"
        return {**self._frame, "object": kind, "choices": choices}

    def _rest(self, arrived: Arrived) -> Json:
        logprobs = None
        if self._logprobs:
            pairs = zip(arrived.token_ids, arrived.logprobs, strict=True)
            logprobs = {"content": [self._value(token, one) for token, one in pairs], "refusal": None}
        finish_reason = _finish_reason(arrived.output)
        return {"logprobs": logprobs, "finish_reason": finish_reason, **_token_ids(self._token_ids, arrived)}

    def _value(self, token: int, one: TokenLogprobs) -> Json:
        return {**self._entry(token, one.logprob), "top_logprobs": [self._entry(*pair) for pair in one.top]}

    def _entry(self, token: int, logprob: float) -> Json:
        text = self._token_text(token)
        return {"token": text, "logprob": logprob, "bytes": list(text.encode(errors="replace"))}


def usage(outputs: Sequence[RequestOutput]) -> Json:
    """Tokens of all prompts (each counted once, however many choices it has) and choices."""
    prompts = {tuple(output.prompt_token_ids): output for output in reversed(outputs)}
    prompt = sum(map(len, prompts))
    generated = sum(len(output.token_ids) for output in outputs)
    cached = sum(output.metrics.cached_tokens for output in prompts.values())
    return counts(prompt, generated) | {"prompt_tokens_details": {"cached_tokens": cached}}


def counts(prompt: int, generated: int) -> Json:
    """Of tokens."""
    return {"prompt_tokens": prompt, "completion_tokens": generated, "total_tokens": prompt + generated}


def _frame(prefix: str, model: str) -> Json:
    return {"id": f"{prefix}-{uuid.uuid4().hex}", "created": int(time.time()), "model": model}


def _finish_reason(output: RequestOutput | None) -> str | None:
    return None if output is None else str(output.finish_reason)


def _token_ids(wanted: bool, arrived: Arrived) -> Json:
    return {"token_ids": arrived.token_ids} if wanted else {}
