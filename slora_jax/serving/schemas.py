"""What answers look like, for the OpenAPI schema: nothing here runs when a request is answered."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi
from pydantic import BaseModel, ConfigDict, Field

from slora_jax.serving.observation import State

Responses = dict[int | str, dict[str, Any]]
FinishReason = Literal["stop", "length"]


class Answer(BaseModel):
    """Every field is always there."""

    model_config = ConfigDict(extra="forbid")


class ErrorDetail(Answer):
    """What went wrong. param: the field that is wrong, if it is one."""

    message: str
    type: str
    param: str | None
    code: str | None


class Error(Answer):
    """OpenAI's error object."""

    error: ErrorDetail


class CachedTokens(Answer):
    """Tokens of prompts whose keys and values were there already."""

    cached_tokens: int


class Usage(Answer):
    """Tokens of a request."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: CachedTokens


class CompletionLogprobs(Answer):
    """By token; null for the first one of an echoed prompt."""

    tokens: list[str]
    token_logprobs: list[float | None]
    top_logprobs: list[dict[str, float] | None]
    text_offset: list[int]


class PromptLogprob(Answer):
    """A token in a position of the prompt.

    Attributes:
      rank: 1 for the most probable token; null if the token is not among those asked for.
    """

    logprob: float
    rank: int | None
    decoded_token: str


class Choice(Answer):
    """A choice of either endpoint. token_ids and prompt_logprobs (by token id; null for the first token) are there if
    asked for."""

    index: int
    finish_reason: FinishReason
    token_ids: list[int] = []
    prompt_logprobs: list[dict[str, PromptLogprob] | None] = []


class CompletionChoice(Choice):
    """A text."""

    text: str
    logprobs: CompletionLogprobs | None


class TokenLogprob(Answer):
    """A token and its bytes in UTF-8."""

    token: str
    logprob: float
    bytes: list[Annotated[int, Field(ge=0, lt=256)]]


class ChatTokenLogprobs(TokenLogprob):
    """The likeliest in its place."""

    top_logprobs: list[TokenLogprob]


class ChatLogprobs(Answer):
    """By token."""

    content: list[ChatTokenLogprobs]
    refusal: None


class AssistantMessage(Answer):
    """What was generated."""

    role: Literal["assistant"]
    content: str
    refusal: None


class ChatChoice(Choice):
    """A message."""

    message: AssistantMessage
    logprobs: ChatLogprobs | None


class _Generated(Answer):
    id: str
    created: int
    model: str
    usage: Usage


class Completion(_Generated):
    """Of /v1/completions."""

    object: Literal["text_completion"]
    choices: list[CompletionChoice]


class ChatCompletion(_Generated):
    """Of /v1/chat/completions."""

    object: Literal["chat.completion"]
    choices: list[ChatChoice]


class Model(Answer):
    """The base model (which alone has `max_model_len` in the list) or an adapter of it."""

    id: str
    object: Literal["model"]
    created: int
    owned_by: str
    root: str
    parent: str | None
    max_model_len: int = 0


class ModelList(Answer):
    """Of /v1/models."""

    object: Literal["list"]
    data: list[Model]


class Adapter(Answer):
    """Where an adapter is and how it was used. aliases: other names of the same content. Times in seconds; `last_used`
    is unix time."""

    name: str
    digest: str
    aliases: list[str]
    rank: int
    pages: int
    bytes: int
    state: State
    last_used: float | None
    requests: int
    prompt_tokens: int
    generated_tokens: int
    queue_seconds_mean: float | None
    queue_seconds_last: float | None


class AdapterList(Answer):
    """refused: why an adapter of the watched directory cannot be used, by name."""

    object: Literal["list"]
    total: int
    data: list[Adapter]
    refused: dict[str, str]


class Loaded(Answer):
    """An adapter that can be used now."""

    message: str
    name: str
    digest: str
    rank: int
    pages: int
    bytes: int


class Unloaded(Answer):
    """freed: whether its memory is free, and not only its name."""

    message: str
    name: str
    freed: bool
    freed_pages: int
    freed_bytes: int
    drain_seconds: float


class EngineHealth(Answer):
    """Of /health."""

    status: str
    error: str | None


class Readiness(Answer):
    """Of /ready."""

    status: str


_ERRORS = {
    400: "A field is wrong, or they contradict each other",
    401: "No valid API key",
    403: "The API key lacks the right, or the path leads out of the configured directories",
    404: "There is no such model or adapter",
    408: "The body did not come in time",
    413: "The body is too large",
    429: "Too many of the client's sequences are unfinished",
    500: "The engine failed",
    503: "Not ready, stopping, or full",
}
_RETRY_AFTER = {"Retry-After": {"description": "Seconds after which to try again", "schema": {"type": "integer"}}}


def answers(model: type[BaseModel], *errors: int, stream: bool = False) -> Responses:
    """For `responses=` of a route: its answer and the errors that it may give instead. stream: it may come as events
    too."""
    responses: Responses = {200: {"model": model, "description": "Success"}}
    if stream:
        responses[200]["content"] = {"text/event-stream": {}}
    return responses | errors_of(*errors)


def errors_of(*statuses: int) -> Responses:
    """For `responses=` of a route: the errors that it may answer."""
    responses: Responses = {}
    for status in statuses:
        responses[status] = {"model": Error, "description": _ERRORS[status]}
        if status in (429, 503):
            responses[status]["headers"] = _RETRY_AFTER
    return responses


GENERATING = (400, 401, 403, 404, 408, 413, 429, 500, 503)
"""Errors of a request that generates."""
MANAGING = (400, 401, 403, 404, 408, 413, 500, 503)
"""Errors of a request that changes adapters."""


class DocumentedApp(FastAPI):
    """An application whose schema has no 422, which is never answered, and says where a key is needed."""

    needs_key = False

    def openapi(self) -> dict[str, Any]:
        if self.openapi_schema is None:
            schema = get_openapi(title=self.title, version=self.version, routes=self.routes)
            for path in schema["paths"].values():
                for operation in path.values():
                    operation["responses"].pop("422", None)
                    if self.needs_key and "401" in operation["responses"]:
                        operation["security"] = [{"key": []}]
            for unused in ("HTTPValidationError", "ValidationError"):
                schema["components"]["schemas"].pop(unused, None)
            if self.needs_key:
                schema["components"]["securitySchemes"] = {"key": {"type": "http", "scheme": "bearer"}}
            self.openapi_schema = schema
        return self.openapi_schema
