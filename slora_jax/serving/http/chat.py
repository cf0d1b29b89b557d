"""Conversations as prompts, by the model's chat template."""

from __future__ import annotations

import inspect
from typing import Any

from slora_jax.engine.arrival import text_ids
from slora_jax.serving.http.bodies import ChatBody, TokenizeBody
from slora_jax.serving.http.errors import ApiError
from slora_jax.serving.http.tools import ToolFormat, forced, tool_format
from slora_jax.serving.service import GeneratingService


def prompt_of(service: GeneratingService, body: ChatBody) -> tuple[list[int], ToolFormat | None]:
    """Returns the token ids of a conversation in the model's chat template, and the format of calls if it has tools.

    Raises:
      ApiError: there is no template, or it refuses the conversation; or the model does not declare how it calls tools,
        or declares it in a form in which no call can be forced.
      RequestError: the conversation is too long.
    """
    engine, offered = service.engine, body.offered
    tools = None
    if offered or any(message.is_about_tools for message in body.messages):
        tools = tool_format(engine.tokenizer, offered)
    text = rendered(service, body, offered or None)
    ids = text_ids(text, engine.tokenizer, engine.max_model_len, add_special_tokens=False)  # the template has them
    if tools is not None and body.forced:
        tools = forced(tools, ids, body.forced)
    return service.checked(ids), tools if offered else None


def rendered(
    service: GeneratingService, body: ChatBody | TokenizeBody, tools: list[dict[str, Any]] | None = None
) -> str:
    """Returns the text of a conversation in the model's chat template.

    Raises:
      ApiError: there is no template, or it refuses the conversation.
    """
    tokenizer = service.engine.tokenizer
    if tokenizer is None or tokenizer.chat_template is None:
        raise ApiError(400, "the model has no chat template; use /v1/completions", code="no_chat_template")
    variables = body.chat_template_kwargs or {}
    for name in inspect.signature(tokenizer.apply_chat_template).parameters:
        if name in variables:  # such as another template, which could run for ever
            message = f"chat_template_kwargs.{name} cannot be set"
            raise ApiError(400, message, code="invalid_value", param="chat_template_kwargs")
    try:
        text: str = tokenizer.apply_chat_template(
            [message.for_template() for message in body.messages or ()],
            tools=tools,
            tokenize=False,
            add_generation_prompt=body.add_generation_prompt,
            **variables,
        )
    except Exception as error:
        message = f"the chat template refuses the messages: {error}"
        raise ApiError(400, message, code="invalid_value", param="messages") from error
    return text
