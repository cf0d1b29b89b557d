"""Tool calls in a model's text, read by transformers' parser as the model's `response_template` declares."""

from __future__ import annotations

import json
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from slora_jax.engine.text import TextStream
from slora_jax.serving.http import answers
from slora_jax.serving.http.errors import ApiError

CALL_LAYOUTS = (
    '{"name": %s, "arguments": %s}',
    '{"name": %s, "parameters": %s}',
    '[{"name": %s, "arguments": %s}]',
    '{"type": "function", "function": {"name": %s, "arguments": %s}}',
)
"""JSON of a call that can be forced, with its function's name and arguments."""
REASONING = ("thinking", "reasoning", "reasoning_content")
"""Names that templates give to the text before the answer."""


@dataclass(frozen=True)
class ToolFormat:
    """The tools of a request, and how the model writes calls of them.

    Attributes:
      call_grammar: grammar of an answer that must be a call, as text of `StructuredOutputs.grammar`; None forces none.
    """

    tokenizer: Any
    template: Mapping[str, Any]
    tools: Sequence[dict[str, Any]]
    call_grammar: str | None = None

    @property
    def forms(self) -> dict[str, dict[str, Any]]:
        """The form that the text must have, as in `Generation.forms`."""
        return {} if self.call_grammar is None else {"tool_choice": {"grammar": self.call_grammar}}


def tool_format(tokenizer: Any, tools: Sequence[dict[str, Any]]) -> ToolFormat:
    """Returns the format of a model's tool calls. The first call takes seconds.

    Raises:
      ApiError: the model does not declare it, or transformers does not know the declaration.
    """
    template = getattr(tokenizer, "response_template", None)
    if template is None:
        message = (
            "tools: not supported with this model: its tokenizer_config.json has no response_template, which declares "
            "how the model writes tool calls; leave tools out, or prescribe a form by response_format"
        )
        raise ApiError(400, message, code="not_supported", param="tools")
    try:
        from transformers.utils.chat_parsing.response_templates import load_response_template

        load_response_template(dict(template))
    except (ImportError, ValueError) as error:
        message = f"tools: transformers cannot use the model's response_template: {error}"
        raise ApiError(400, message, code="not_supported", param="tools") from error
    return ToolFormat(tokenizer, template, tools)


def forced(form: ToolFormat, prompt: list[int], names: Sequence[str]) -> ToolFormat:
    """Returns the format with the grammar of an answer that is one call of one of the named functions, with arguments
    of its schema. It is the first of `CALL_LAYOUTS` that transformers reads back after this prompt.

    Raises:
      ApiError: the model declares calls that are not JSON between fixed texts.
    """
    declared = form.template["fields"].get("tool_calls", {}).get("open", ())
    for opening in [declared] if isinstance(declared, str) else declared:
        for layout in CALL_LAYOUTS:
            calls = ToolParser(form, prompt).push_text(opening + layout % (json.dumps(names[0]), "{}"), True).calls
            if [call["function"] for call in calls] == [{"name": names[0], "arguments": "{}"}]:
                return replace(form, call_grammar=_call_grammar(form, opening, layout, names))
    message = (
        "tool_choice: a call cannot be forced with this model: the tool_calls of its response_template are not JSON "
        'after a fixed text; use "auto", or prescribe a form by response_format'
    )
    raise ApiError(400, message, code="not_supported", param="tool_choice")


def _call_grammar(form: ToolFormat, opening: str, layout: str, names: Sequence[str]) -> str:
    """Returns llguidance's Lark for `opening` and a call. The answer ends with the call, so nothing closes it."""
    added = form.tokenizer.backend_tokenizer.get_added_tokens_decoder()
    special = [number for number, token in added.items() if token.special and token.content == opening]
    before, between, after = layout.split("%s")
    calls = []
    for function in (tool["function"] for tool in form.tools):
        if function["name"] in names:
            schema = {"type": "object"} | (function.get("parameters") or {"additionalProperties": False})
            head = json.dumps(before + json.dumps(function["name"]) + between)
            calls.append(f"{head} %json {json.dumps(schema)} {json.dumps(after)}")
    start = f"<[{special[0]}]>" if special else json.dumps(opening)
    return f"start: {start} WHITE call\nWHITE: /\\n?/\ncall: " + " | ".join(calls)


@dataclass
class Parsed:
    """New parts of a message."""

    content: str = ""
    reasoning: str = ""
    calls: list[answers.ToolCallPiece] = field(default_factory=list)


class ToolParser:
    """Reads one message as its tokens come. Once the text does not follow the template, the rest of it is content.

    Attributes:
      num_calls: number of calls so far.
    """

    def __init__(self, form: ToolFormat, prompt: list[int]) -> None:
        from transformers.utils.chat_parsing import ResponseParser

        self._text = TextStream(form.tokenizer, (), prompt, skip_special=False)
        self._parser = ResponseParser(dict(form.template), prefix=form.tokenizer.decode(prompt), tools=list(form.tools))
        self._reported = 0  # characters of the text that are reported as content or in a call
        self._has_failed = False
        self.num_calls = 0

    def push(self, tokens: Sequence[int], is_last: bool) -> Parsed:
        """Returns the parts that new tokens complete."""
        for token in tokens:
            self._text.push(token)
        if is_last:
            self._text.finish()
        return self.push_text(self._text.take(last=is_last), is_last)

    def push_text(self, text: str, is_last: bool) -> Parsed:
        """Returns the parts that new text completes."""
        parsed = Parsed()
        if self._has_failed:
            return Parsed(text)
        try:
            events = self._parser.feed(text)
            for event in events + (self._parser.finalize()[1] if is_last else []):
                self._take(event, parsed)
        except (ValueError, TypeError, KeyError, AttributeError):  # what the model wrote is no call
            self._has_failed = True
            parsed.content += self._text.text[self._reported :]
        return parsed

    def _take(self, event: Mapping[str, Any], parsed: Parsed) -> None:
        is_call = event["field"] == "tool_calls"
        if event["type"] == "region_close" and is_call:
            value = event["value"]
            parsed.calls += [self._call(one) for one in (value if isinstance(value, list) else [value])]
            self._reported = len(self._text.text)
        elif event["type"] == "region_chunk" and not is_call:
            text: str = event["text"]
            at = self._text.text.find(text, self._reported)
            self._reported = at + len(text) if at >= 0 else self._reported
            if event["field"] in REASONING:
                parsed.reasoning += text
            else:
                parsed.content += text

    def _call(self, value: Mapping[str, Any]) -> answers.ToolCallPiece:
        function = value.get("function", value)
        name, arguments = function["name"], function.get("arguments", {})
        if not isinstance(name, str):
            raise TypeError(f"the name of a function must be text, found {name!r}")
        self.num_calls += 1
        return {
            "index": self.num_calls - 1,
            "id": f"call_{uuid.uuid4().hex[:24]}",
            "type": "function",
            "function": {
                "name": name,
                "arguments": arguments if isinstance(arguments, str) else json.dumps(arguments),
            },
        }
