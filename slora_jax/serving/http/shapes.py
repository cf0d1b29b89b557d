"""Builds answers from generated tokens: OpenAI's objects for completions and for chat, whole and in pieces."""

from __future__ import annotations

import codecs
import time
import uuid
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, ClassVar, cast

from slora_jax.engine import Delta, RequestOutput
from slora_jax.engine.outputs import TokenLogprobs
from slora_jax.serving.http import answers
from slora_jax.serving.http.errors import to_json
from slora_jax.serving.http.token_text import TokenText
from slora_jax.serving.http.tools import ToolFormat, ToolParser


class Shape(ABC):
    """The form of an endpoint's answers. `index` is a choice's number.

    Attributes:
      is_plain: whether a choice's pieces differ in their text only, from the first to the last but one.
    """

    prefix: ClassVar[str]
    whole_object: ClassVar[str]
    chunk_object: ClassVar[Any]

    def __init__(
        self,
        model: str,
        token_text: TokenText,
        prompts: Sequence[list[int]],
        *,
        logprobs: bool = False,
        token_ids: bool = False,
        prompt_logprobs: bool = False,
    ) -> None:
        """Creates the form of one request's answers.

        Args:
          prompts: token ids of each choice's prompt.
          logprobs, token_ids, prompt_logprobs: fields asked for.
        """
        self._frame: answers.Frame = {
            "id": f"{self.prefix}-{uuid.uuid4().hex}", "created": int(time.time()), "model": model
        }  # fmt: skip
        opened = to_json({**self._frame, "object": self.chunk_object, "choices": []})
        self._event_start = f"data: {opened.removesuffix(']}')}"  # the same in every event, so encoded once
        self.prompts, self._token_text, self._logprobs = prompts, token_text, logprobs
        self._token_ids, self._prompt_logprobs = token_ids, prompt_logprobs
        self.is_plain = not (logprobs or token_ids or prompt_logprobs)

    def opening(self, index: int, first: Delta) -> answers.Piece | None:
        """Returns a piece to send before a choice's first tokens, if there is one."""
        return None

    @abstractmethod
    def piece(self, index: int, arrived: Delta) -> answers.Piece:
        """Returns the new tokens of a choice."""

    @abstractmethod
    def choice(self, index: int, whole: Delta) -> answers.Choice:
        """Returns a complete choice."""

    def event(self, piece: str, used: answers.TokenCounts | None = None) -> str:
        """Returns an event of a stream, a `Chunk` in JSON.

        Args:
          piece: a piece in JSON; empty for an event without one.
        """
        usage = "" if used is None else f',"usage":{to_json(used)}'
        return f"{self._event_start}{piece}]{usage}}}\n\n"

    def around(self, index: int) -> tuple[str, str]:
        """Returns what is before and after the text, in JSON, in a choice's events if the shape `is_plain`."""
        before, after = self.event(to_json(self.piece(index, Delta("", [], "")))).rsplit('""', 1)
        return before, after

    def whole(self, choices: Sequence[answers.Choice], usage: answers.Usage) -> dict[str, Any]:
        """Returns a whole answer, `Completion` or `ChatCompletion`."""
        return {**self._frame, "object": self.whole_object, "choices": choices, "usage": usage}

    def _extras(self, index: int, arrived: Delta) -> answers.Extras:
        extras: answers.Extras = {"token_ids": arrived.token_ids} if self._token_ids else {}
        if self._prompt_logprobs and arrived.prompt_logprobs is not None:
            pairs = zip(self.prompts[index], arrived.prompt_logprobs, strict=True)
            extras["prompt_logprobs"] = [None if one is None else self._ranked(token, one) for token, one in pairs]
        return extras

    def _ranked(self, token: int, one: TokenLogprobs) -> dict[str, answers.PromptLogprob]:
        """Entries by token id. The prompt's own token has a rank only if it is among `one.top`."""
        values: dict[int, tuple[float, int | None]] = {token: (one.logprob, None)}
        values |= {t: (value, rank) for rank, (t, value) in enumerate(one.top, 1)}
        return {
            str(t): {"logprob": value, "rank": rank, "decoded_token": self._token_text.name(t)}
            for t, (value, rank) in values.items()
        }


class CompletionShape(Shape):
    """Answers of /v1/completions."""

    prefix, whole_object, chunk_object = "cmpl", "text_completion", "text_completion"

    def __init__(self, *args: Any, echoes: Sequence[str], **fields: Any) -> None:
        """Creates the form as `Shape` does.

        Args:
          echoes: text that precedes each choice's own.
        """
        super().__init__(*args, **fields)
        self._echoes = echoes
        self._offsets = [_Offsets(self._token_text, len(echo)) for echo in echoes]

    def opening(self, index: int, first: Delta) -> answers.CompletionPiece | None:
        echo = self._echoes[index]
        if not echo:
            return None
        return {"index": index, "text": echo, "logprobs": self._of_prompt(index, first), "finish_reason": None}

    def piece(self, index: int, arrived: Delta) -> answers.CompletionPiece:
        return {
            "index": index,
            "text": arrived.text,
            "logprobs": self._of_output(index, arrived),
            "finish_reason": _finish_reason(arrived.output),
            **self._extras(index, arrived),
        }

    def choice(self, index: int, whole: Delta) -> answers.CompletionChoice:
        choice = cast(answers.CompletionChoice, self.piece(index, whole))
        choice["text"] = self._echoes[index] + whole.text
        prompt, output = self._of_prompt(index, whole), choice["logprobs"]
        if prompt is not None and output is not None:
            choice["logprobs"] = {
                "tokens": prompt["tokens"] + output["tokens"],
                "token_logprobs": prompt["token_logprobs"] + output["token_logprobs"],
                "top_logprobs": prompt["top_logprobs"] + output["top_logprobs"],
                "text_offset": prompt["text_offset"] + output["text_offset"],
            }
        return choice

    def _of_output(self, index: int, arrived: Delta) -> answers.CompletionLogprobs | None:
        return self._lists(arrived.token_ids, arrived.logprobs or (), self._offsets[index]) if self._logprobs else None

    def _of_prompt(self, index: int, arrived: Delta) -> answers.CompletionLogprobs | None:
        """Log-probabilities of an echoed prompt."""
        echo = self._echoes[index]
        if not (self._logprobs and echo and arrived.prompt_logprobs):
            return None
        return self._lists(self.prompts[index], arrived.prompt_logprobs, _Offsets(self._token_text, 0, echo))

    def _lists(
        self, tokens: Sequence[int], values: Sequence[TokenLogprobs | None], offsets: _Offsets
    ) -> answers.CompletionLogprobs:
        text = self._token_text
        return {
            "tokens": [text.name(token) for token in tokens],
            "token_logprobs": [None if one is None else one.logprob for one in values],
            "top_logprobs": [None if one is None else text.values(one.top) for one in values],
            "text_offset": [offsets.next(token) for token in tokens],
        }


class ChatShape(Shape):
    """Answers of /v1/chat/completions."""

    prefix, whole_object, chunk_object = "chatcmpl", "chat.completion", "chat.completion.chunk"

    def __init__(self, *args: Any, tools: ToolFormat | None = None, **fields: Any) -> None:
        """Creates the form as `Shape` does.

        Args:
          tools: None if the request has no tools; the text is then content, as it is.
        """
        super().__init__(*args, **fields)
        self._parsers = [] if tools is None else [ToolParser(tools, prompt) for prompt in self.prompts]
        self.is_plain &= not self._parsers

    def opening(self, index: int, first: Delta) -> answers.ChatPiece:
        return {"index": index, "delta": {"role": "assistant", "content": ""}, "logprobs": None, "finish_reason": None}

    def piece(self, index: int, arrived: Delta) -> answers.ChatPiece:
        delta: answers.Delta = {"content": arrived.text} if arrived.text or arrived.output is None else {}
        if self._parsers:
            parsed = self._parsers[index].push(arrived.token_ids, arrived.output is not None)
            delta = {"content": parsed.content} if parsed.content else {}
            if parsed.reasoning:
                delta["reasoning_content"] = parsed.reasoning
            if parsed.calls:
                delta["tool_calls"] = parsed.calls
        return {
            "index": index,
            "delta": delta,
            "logprobs": self._of_output(arrived),
            "finish_reason": self._reason(index, arrived),
            **self._extras(index, arrived),
        }

    def choice(self, index: int, whole: Delta) -> answers.ChatChoice:
        message: answers.AssistantMessage = {"role": "assistant", "content": whole.text, "refusal": None}
        if self._parsers:
            parsed = self._parsers[index].push(whole.token_ids, is_last=True)
            message["content"] = parsed.content.strip() or (None if parsed.calls else "")
            if parsed.reasoning:
                message["reasoning_content"] = parsed.reasoning.strip()
            if parsed.calls:
                message["tool_calls"] = [
                    {"id": call["id"], "type": call["type"], "function": call["function"]} for call in parsed.calls
                ]
        return {
            "index": index,
            "message": message,
            "logprobs": self._of_output(whole),
            "finish_reason": cast(answers.FinishReason, self._reason(index, whole)),
            **self._extras(index, whole),
        }

    def _reason(self, index: int, arrived: Delta) -> answers.FinishReason | None:
        reason = _finish_reason(arrived.output)
        return "tool_calls" if reason == "stop" and self._parsers and self._parsers[index].num_calls else reason

    def _of_output(self, arrived: Delta) -> answers.ChatLogprobs | None:
        if not self._logprobs:
            return None
        pairs = zip(arrived.token_ids, arrived.logprobs or (), strict=True)
        return {"content": [self._value(token, one) for token, one in pairs], "refusal": None}

    def _value(self, token: int, one: TokenLogprobs) -> answers.ChatTokenLogprobs:
        return {**self._entry(token, one.logprob), "top_logprobs": [self._entry(*pair) for pair in one.top]}

    def _entry(self, token: int, logprob: float) -> answers.TokenLogprob:
        text = self._token_text
        return {"token": text.name(token), "logprob": logprob, "bytes": list(text.raw(token))}


class _Offsets:
    """Offsets of tokens in a text, in characters."""

    def __init__(self, token_text: TokenText, start: int, known: str | None = None) -> None:
        """Starts before the first token.

        Args:
          known: the text; None: the text is what the tokens decode to.
        """
        self._token_text, self._at, self._known = token_text, start, known
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")  # a character begins in its first token

    def next(self, token: int) -> int:
        """Returns the offset of the next token."""
        at = self._at
        if self._known is None and self._token_text.is_special(token):
            return at
        incomplete, _ = self._decoder.getstate()
        piece = self._decoder.decode(self._token_text.raw(token))
        if incomplete and piece.startswith("\ufffd"):  # it stays incomplete, and the token begins after it
            at, self._at, piece = at + 1, self._at + 1, piece[1:]
        if self._known is None:
            self._at += len(piece)
            return at
        for written in (piece, piece.removeprefix(" ")):  # without the space that a tokenizer puts before a text
            if self._known.startswith(written, at):
                self._at += len(written)
                break
        return at


def usage(outputs: Sequence[RequestOutput], choices: int) -> answers.Usage:
    """Counts tokens.

    Args:
      outputs: of all choices; the `choices` of one prompt are neighbours, and the prompt counts once.
    """
    prompt = sum(len(output.prompt_token_ids) for output in outputs[::choices])
    generated = sum(len(output.token_ids) for output in outputs)
    cached = sum(output.metrics.cached_tokens for output in outputs[::choices])
    return {**counts(prompt, generated), "prompt_tokens_details": {"cached_tokens": cached}}


def counts(prompt: int, generated: int) -> answers.TokenCounts:
    """Returns numbers of tokens, for an event of a stream."""
    return {"prompt_tokens": prompt, "completion_tokens": generated, "total_tokens": prompt + generated}


def _finish_reason(output: RequestOutput | None) -> answers.FinishReason | None:
    return None if output is None else cast(answers.FinishReason, str(output.finish_reason))
