"""The JSON of answers: OpenAI's objects for completions and for chat, whole and in pieces."""

from __future__ import annotations

import codecs
import time
import uuid
from collections.abc import Sequence
from typing import Any, Protocol

from slora_jax.engine import RequestOutput
from slora_jax.engine.outputs import TokenLogprobs
from slora_jax.serving.mailbox import Arrived
from slora_jax.serving.token_text import TokenText

Json = dict[str, Any]


class Shape(Protocol):
    """How an endpoint's answers look. `index` is a choice's."""

    def opening(self, index: int, first: Arrived) -> Json | None:
        """A choice's piece before that of what has come first; None: there is none."""

    def piece(self, index: int, arrived: Arrived) -> Json:
        """What has come of a choice."""

    def choice(self, index: int, whole: Arrived) -> Json:
        """A choice that is complete."""

    def envelope(self, choices: list[Json], *, streamed: bool) -> Json:
        """The object around choices."""


class _Extras:
    """Fields beyond OpenAI's: token ids, and log-probabilities of the prompt as vLLM writes them."""

    def __init__(self, token_text: TokenText, token_ids: bool, prompt_logprobs: bool) -> None:
        self._token_text, self._token_ids, self._prompt_logprobs = token_text, token_ids, prompt_logprobs

    def __call__(self, prompt: list[int], arrived: Arrived) -> Json:
        extras: Json = {"token_ids": arrived.token_ids} if self._token_ids else {}
        if self._prompt_logprobs and arrived.prompt_logprobs is not None:
            pairs = zip(prompt, arrived.prompt_logprobs, strict=True)
            extras["prompt_logprobs"] = [None if one is None else self._ranked(token, one) for token, one in pairs]
        return extras

    def _ranked(self, token: int, one: TokenLogprobs) -> Json:
        """Entries by token id. The prompt's own token has a rank only if it is among `one.top`."""
        values = {token: (one.logprob, None), **{t: (value, rank) for rank, (t, value) in enumerate(one.top, 1)}}
        return {
            str(t): {"logprob": value, "rank": rank, "decoded_token": self._token_text.name(t)}
            for t, (value, rank) in values.items()
        }


class CompletionShape:
    """Of /v1/completions."""

    def __init__(
        self,
        model: str,
        token_text: TokenText,
        *,
        logprobs: bool,
        token_ids: bool,
        prompt_logprobs: bool,
        echoes: Sequence[str],
        prompts: Sequence[list[int]],
    ) -> None:
        """By choice: echoes, what precedes its text; prompts, their tokens."""
        self._frame = _frame("cmpl", model)
        self._token_text, self._logprobs, self._echoes, self._prompts = token_text, logprobs, echoes, prompts
        self._extras = _Extras(token_text, token_ids, prompt_logprobs)
        self._offsets = [_Offsets(token_text, len(echo)) for echo in echoes]

    def opening(self, index: int, first: Arrived) -> Json | None:
        if not self._echoes[index]:
            return None
        return self._choice(index, self._echoes[index], self._of_prompt(index, first), None)

    def piece(self, index: int, arrived: Arrived) -> Json:
        choice = self._choice(index, arrived.text, self._values(index, arrived), _finish_reason(arrived.output))
        return choice | self._extras(self._prompts[index], arrived)

    def choice(self, index: int, whole: Arrived) -> Json:
        choice, echo, of_prompt = self.piece(index, whole), self._echoes[index], self._of_prompt(index, whole)
        if of_prompt is not None:
            choice["logprobs"] = {name: of_prompt[name] + choice["logprobs"][name] for name in of_prompt}
        return choice | {"text": echo + whole.text}

    def envelope(self, choices: list[Json], *, streamed: bool) -> Json:
        return {**self._frame, "object": "text_completion", "choices": choices}

    def _choice(self, index: int, text: str, logprobs: Json | None, finish_reason: str | None) -> Json:
        return {"index": index, "text": text, "logprobs": logprobs, "finish_reason": finish_reason}

    def _values(self, index: int, arrived: Arrived) -> Json | None:
        if not self._logprobs:
            return None
        offsets = [self._offsets[index].next(token) for token in arrived.token_ids]
        return self._lists(arrived.token_ids, arrived.logprobs, offsets)

    def _of_prompt(self, index: int, arrived: Arrived) -> Json | None:
        """The log-probabilities of an echo."""
        echo, prompt = self._echoes[index], self._prompts[index]
        if not (self._logprobs and echo and arrived.prompt_logprobs):
            return None
        offsets = _Offsets(self._token_text, 0, echo)
        return self._lists(prompt, arrived.prompt_logprobs, [offsets.next(token) for token in prompt])

    def _lists(self, tokens: Sequence[int], values: Sequence[TokenLogprobs | None], offsets: list[int]) -> Json:
        text = self._token_text
        return {
            "tokens": [text.name(token) for token in tokens],
            "token_logprobs": [one and one.logprob for one in values],
            "top_logprobs": [one and text.values(one.top) for one in values],
            "text_offset": offsets,
        }


class ChatShape:
    """Of /v1/chat/completions."""

    def __init__(
        self,
        model: str,
        token_text: TokenText,
        *,
        logprobs: bool,
        token_ids: bool,
        prompt_logprobs: bool,
        prompt: list[int],
    ) -> None:
        self._frame = _frame("chatcmpl", model)
        self._token_text, self._logprobs, self._prompt = token_text, logprobs, prompt
        self._extras = _Extras(token_text, token_ids, prompt_logprobs)

    def opening(self, index: int, first: Arrived) -> Json | None:
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
        return {"logprobs": logprobs, "finish_reason": finish_reason, **self._extras(self._prompt, arrived)}

    def _value(self, token: int, one: TokenLogprobs) -> Json:
        return {**self._entry(token, one.logprob), "top_logprobs": [self._entry(*pair) for pair in one.top]}

    def _entry(self, token: int, logprob: float) -> Json:
        text = self._token_text
        return {"token": text.name(token), "logprob": logprob, "bytes": list(text.raw(token))}


class _Offsets:
    """Offsets of tokens in a text. known: the text; None: the text is what the tokens decode to."""

    def __init__(self, token_text: TokenText, start: int, known: str | None = None) -> None:
        self._token_text, self._at, self._known = token_text, start, known
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")  # a character begins in its first token

    def next(self, token: int) -> int:
        """Returns the offset of the next token."""
        at = self._at
        if self._known is None and self._token_text.is_special(token):
            return at
        incomplete, _ = self._decoder.getstate()
        piece = self._decoder.decode(self._token_text.raw(token))
        if incomplete and piece.startswith("\ufffd"):  # it stays so, and the token begins after it
            at, self._at, piece = at + 1, self._at + 1, piece[1:]
        if self._known is None:
            self._at += len(piece)
            return at
        for written in (piece, piece.removeprefix(" ")):  # without the space that a tokenizer puts before a text
            if self._known.startswith(written, at):
                self._at += len(written)
                break
        return at


def usage(outputs: Sequence[RequestOutput], choices: int) -> Json:
    """Tokens of all prompts, each of which has several choices in a row and is counted once, and of the choices."""
    prompt = sum(len(output.prompt_token_ids) for output in outputs[::choices])
    generated = sum(len(output.token_ids) for output in outputs)
    cached = sum(output.metrics.cached_tokens for output in outputs[::choices])
    return counts(prompt, generated) | {"prompt_tokens_details": {"cached_tokens": cached}}


def counts(prompt: int, generated: int) -> Json:
    """Of tokens."""
    return {"prompt_tokens": prompt, "completion_tokens": generated, "total_tokens": prompt + generated}


def _frame(prefix: str, model: str) -> Json:
    return {"id": f"{prefix}-{uuid.uuid4().hex}", "created": int(time.time()), "model": model}


def _finish_reason(output: RequestOutput | None) -> str | None:
    return None if output is None else str(output.finish_reason)
