"""The service's answers, each declared once: what endpoints return, what mypy checks, what the OpenAPI schema shows.

They are typed dictionaries, which cost nothing when they are built: a stream builds one for every token.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any, Literal, NotRequired, TypedDict, is_typeddict

from pydantic import ConfigDict, Field

from slora_jax.serving.observability.snapshot import State

FinishReason = Literal["stop", "length", "tool_calls"]


class ErrorDetail(TypedDict):
    """An error. param: the wrong field, if a field is wrong."""

    message: str
    type: str
    param: str | None
    code: str | None


class Error(TypedDict):
    """OpenAI's error object."""

    error: ErrorDetail


class TokenCounts(TypedDict):
    """Tokens of a request so far, in every event of a stream if asked for."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int


class CachedTokens(TypedDict):
    """Prompt tokens whose keys and values were in the prefix cache."""

    cached_tokens: int


class Usage(TokenCounts):
    """Tokens of a request."""

    prompt_tokens_details: CachedTokens


class CompletionLogprobs(TypedDict):
    """Lists by token; an entry is null for the first token of an echoed prompt."""

    tokens: list[str]
    token_logprobs: list[float | None]
    top_logprobs: list[dict[str, float] | None]
    text_offset: list[int]


class PromptLogprob(TypedDict):
    """A token at a position of the prompt.

    Attributes:
      rank: 1 for the most probable token; null if the token is not among those asked for.
    """

    logprob: float
    rank: int | None
    decoded_token: str


class TokenLogprob(TypedDict):
    """A token and its bytes in UTF-8."""

    token: str
    logprob: float
    bytes: list[Annotated[int, Field(ge=0, lt=256)]]


class ChatTokenLogprobs(TokenLogprob):
    """A generated token, and the most probable tokens at its position."""

    top_logprobs: list[TokenLogprob]


class ChatLogprobs(TypedDict):
    """Log-probabilities by token."""

    content: list[ChatTokenLogprobs]
    refusal: None


class Extras(TypedDict):
    """Fields beyond OpenAI's, present if asked for. prompt_logprobs: by token id; null for the first token."""

    token_ids: NotRequired[list[int]]
    prompt_logprobs: NotRequired[list[dict[str, PromptLogprob] | None]]


class Choice(Extras):
    """A choice of either endpoint."""

    index: int
    finish_reason: FinishReason


class CompletionChoice(Choice):
    """A generated text."""

    text: str
    logprobs: CompletionLogprobs | None


class FunctionCall(TypedDict):
    """A function's name, and its arguments as JSON text, which the model may have got wrong."""

    name: str
    arguments: str


class ToolCall(TypedDict):
    """A call that the model asks for."""

    id: str
    type: Literal["function"]
    function: FunctionCall


class ToolCallPiece(ToolCall):
    """A whole call, in an event of a stream."""

    index: int


class AssistantMessage(TypedDict):
    """A generated message. content: null if there are only calls."""

    role: Literal["assistant"]
    content: str | None
    refusal: None
    reasoning_content: NotRequired[str]
    tool_calls: NotRequired[list[ToolCall]]


class ChatChoice(Choice):
    """A generated message."""

    message: AssistantMessage
    logprobs: ChatLogprobs | None


class Frame(TypedDict):
    """Fields of every answer with choices, and of every event of a stream."""

    id: str
    created: int
    model: str


class Completion(Frame):
    """Answer of /v1/completions."""

    object: Literal["text_completion"]
    choices: list[CompletionChoice]
    usage: Usage


class ChatCompletion(Frame):
    """Answer of /v1/chat/completions."""

    object: Literal["chat.completion"]
    choices: list[ChatChoice]
    usage: Usage


class Piece(Extras):
    """New tokens of a choice, in an event of a stream."""

    index: int
    finish_reason: FinishReason | None


class CompletionPiece(Piece):
    """New text."""

    text: str
    logprobs: CompletionLogprobs | None


class Delta(TypedDict):
    """New parts of a message."""

    role: NotRequired[Literal["assistant"]]
    content: NotRequired[str]
    reasoning_content: NotRequired[str]
    tool_calls: NotRequired[list[ToolCallPiece]]


class ChatPiece(Piece):
    """A piece of a message."""

    delta: Delta
    logprobs: ChatLogprobs | None


class Chunk(Frame):
    """An event of a stream."""

    object: Literal["text_completion", "chat.completion.chunk"]
    choices: Sequence[Piece]
    usage: NotRequired[TokenCounts | Usage]


class Model(TypedDict):
    """The base model (which alone has `max_model_len` in the list) or an adapter of it."""

    id: str
    object: Literal["model"]
    created: int
    owned_by: str
    root: str
    parent: str | None
    max_model_len: NotRequired[int]


class ModelList(TypedDict):
    """Answer of /v1/models."""

    object: Literal["list"]
    data: list[Model]


class Adapter(TypedDict):
    """An adapter: where it is, and how it was used.

    Attributes:
      aliases: other names of the same content.
      bytes: size in host memory.
      last_used: unix seconds; null if it was never used.
      queue_seconds_mean, queue_seconds_last: waits of its admitted requests.
      replica: rank of the replica that this is about, if there are several.
    """

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
    replica: NotRequired[int]


class AdapterList(TypedDict):
    """Answer of /v1/adapters. refused: by name, why an adapter of the watched directory cannot be used."""

    object: Literal["list"]
    total: int
    data: list[Adapter]
    refused: dict[str, str]


class Embedding(TypedDict):
    """An embedding: numbers, or their bytes as float32 (little-endian) in base64."""

    object: Literal["embedding"]
    index: int
    embedding: list[float] | str


class EmbeddingUsage(TypedDict):
    """Tokens of the inputs."""

    prompt_tokens: int
    total_tokens: int


class Embeddings(TypedDict):
    """Answer of /v1/embeddings."""

    object: Literal["list"]
    model: str
    data: list[Embedding]
    usage: EmbeddingUsage


class Tokenized(TypedDict):
    """Answer of /tokenize. token_strs: the tokens' texts, if asked for."""

    count: int
    max_model_len: int
    tokens: list[int]
    token_strs: list[str] | None


class Detokenized(TypedDict):
    """Answer of /detokenize."""

    prompt: str


class Loaded(TypedDict):
    """An adapter that can be used now."""

    message: str
    name: str
    digest: str
    rank: int
    pages: int
    bytes: int


class Unloaded(TypedDict):
    """An adapter whose name is unloaded. freed: whether its memory is free too."""

    message: str
    name: str
    freed: bool
    freed_pages: int
    freed_bytes: int
    drain_seconds: float


class EngineHealth(TypedDict):
    """Answer of /health."""

    status: str
    error: str | None


class Readiness(TypedDict):
    """Answer of /ready."""

    status: str


def _close(answers: dict[str, Any]) -> None:
    """Tells Pydantic that answers have no other fields, for the OpenAPI schema."""
    for answer in answers.values():
        if is_typeddict(answer):
            answer.__pydantic_config__ = ConfigDict(extra="forbid")


_close(globals())
