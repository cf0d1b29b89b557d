"""Messages of a chat, and the tools that they are about, as request bodies have them."""

from __future__ import annotations

import json
from typing import Annotated, Any, Literal

from pydantic import Field

from slora_jax.serving.http.body import MAX_MESSAGES, MAX_TOOLS, Body, Name, Only, Schema, Text, at_most


class TextPart(Body):
    """A part of a message's content."""

    type: Literal["text"]
    text: str


class CalledFunction(Body):
    """The function of a call, with its arguments as JSON text."""

    name: Name
    arguments: str = ""


class Call(Body):
    """A call in an earlier answer of the model."""

    id: Text | None = None
    type: Literal["function"] = "function"
    function: CalledFunction


class Function(Body):
    """A function that the model may call. Only a call that `tool_choice` forces is forced into its parameters, whatever
    `strict` is."""

    name: Name
    description: str | None = None
    parameters: Schema | None = None
    strict: bool | None = None


class Tool(Body):
    """OpenAI's tool."""

    type: Literal["function"]
    function: Function


class ChosenFunction(Body):
    """The name of a function of the request's tools."""

    name: Name


class ChosenTool(Body):
    """OpenAI's tool_choice of one function."""

    type: Literal["function"]
    function: ChosenFunction


class Message(Body):
    """A message of a chat. The model's template decides which roles exist. Other fields that only answers have are
    accepted if they are empty."""

    role: Text
    content: str | Annotated[list[TextPart], Field(fail_fast=True), at_most(MAX_MESSAGES)] | None = None
    name: Text | None = None
    type: Annotated[Any, Only(None, "text", "message")] = None
    tool_calls: Annotated[list[Call], Field(fail_fast=True), at_most(MAX_TOOLS)] | None = None
    tool_call_id: Text | None = None
    function_call: Annotated[Any, Only(None)] = None

    @property
    def is_about_tools(self) -> bool:
        """True if it has calls, or answers one."""
        return bool(self.tool_calls) or self.tool_call_id is not None

    def for_template(self) -> dict[str, Any]:
        """Returns the message as chat templates expect it: content as text, arguments of calls as objects.

        Raises:
          ValueError: the arguments of a call are not JSON.
        """
        content = self.content or ""
        text = content if isinstance(content, str) else "".join(part.text for part in content)
        message: dict[str, Any] = {"role": self.role, "content": text}
        if self.name is not None:
            message["name"] = self.name
        if self.tool_call_id is not None:
            message["tool_call_id"] = self.tool_call_id
        if self.tool_calls:
            message["tool_calls"] = [
                call.model_dump(exclude_none=True)
                | {"function": {"name": call.function.name, "arguments": json.loads(call.function.arguments or "{}")}}
                for call in self.tool_calls
            ]
        return message
