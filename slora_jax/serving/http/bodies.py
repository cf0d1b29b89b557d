"""Request bodies: OpenAI's fields, and vLLM's names for fields that OpenAI lacks.

An unknown field is refused, and so is a field that asks for something the engine cannot do, so that no answer silently
ignores a field. An empty field is accepted: clients send null, and send answers back as messages.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    GetCoreSchemaHandler,
    GetJsonSchemaHandler,
    model_validator,
)
from pydantic_core import CoreSchema, PydanticCustomError
from pydantic_core.core_schema import no_info_plain_validator_function

from slora_jax.scheduling import SamplingParams
from slora_jax.scheduling.sampling_params import MAX_LOGPROBS

MAX_FIELDS = 64
"""Most fields of an object; no body has as many."""
MAX_PROMPTS = 4096
MAX_MESSAGES = 10_000


def at_most(count: int) -> BeforeValidator:
    """Refuses a longer list or object before its items are validated."""

    def check(data: Any) -> Any:
        if isinstance(data, list | dict) and len(data) > count:
            raise ValueError(f"there are {len(data)} items; at most {count} can be")
        return data

    return BeforeValidator(check)


NOT_SUPPORTED = frozenset(
    (
        *("audio", "prediction", "reasoning_effort", "web_search_options", "verbosity"),
        *("guided_json", "guided_regex", "guided_choice", "guided_grammar", "structured_outputs", "grammar"),
        *("use_beam_search", "length_penalty", "min_tokens", "bad_words", "allowed_token_ids", "logits_processors"),
        *("truncate_prompt_tokens", "skip_special_tokens", "include_stop_str_in_output", "priority", "dry_multiplier"),
    )
)
"""Fields of OpenAI and of other servers, refused as not supported rather than as unknown."""
NOTHING: tuple[Any, ...] = (None, "", [], {})
"""Empty values: any field with one of them is accepted."""


class Only:
    """Annotates an unsupported field: it accepts only `values`, with which it has no effect."""

    def __init__(self, *values: Any) -> None:
        self._values = values

    def __get_pydantic_core_schema__(self, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        return no_info_plain_validator_function(self._check)

    def __get_pydantic_json_schema__(self, schema: CoreSchema, handler: GetJsonSchemaHandler) -> dict[str, Any]:
        return {"enum": list(self._values)}

    def _check(self, data: Any) -> Any:
        if not any(type(data) is type(value) and data == value for value in self._values):
            raise PydanticCustomError("not_supported", "not supported")
        return data


# fail_fast: only the first wrong item of a list is reported; complaints about a million would take gigabytes.
Token = Annotated[int, Field(ge=0, lt=2**31)]
Tokens = Annotated[list[Token], Field(fail_fast=True, min_length=1)]
Text = Annotated[str, Field(max_length=256)]
Name = Annotated[str, Field(min_length=1, max_length=256)]


class Body(BaseModel):
    """A strict body: text is not converted to numbers, and an unknown field is refused unless it is empty."""

    model_config = ConfigDict(
        extra="forbid",
        strict=True,
        allow_inf_nan=False,
        json_schema_extra={"additionalProperties": {"enum": list(NOTHING)}},
    )

    @model_validator(mode="before")
    @classmethod
    def _check_size(cls, data: Any) -> Any:
        if isinstance(data, dict) and len(data) > MAX_FIELDS:
            raise ValueError(f"an object with {len(data)} fields; at most {MAX_FIELDS} can be")
        if isinstance(data, dict):
            return {name: value for name, value in data.items() if name in cls.model_fields or value not in NOTHING}
        return data


class StreamOptions(Body):
    """include_usage: the last event has the usage. continuous_usage_stats: every event has it."""

    include_usage: bool = False
    continuous_usage_stats: bool = False
    include_obfuscation: bool = False


class Generation(Body):
    """Fields that completions and chat share.

    Beyond OpenAI's: top_k, min_p, stop_token_ids, ignore_eos, prompt_logprobs (see `SamplingParams`) and
    return_token_ids (each choice then has `token_ids`). With a seed, choice i of each prompt uses seed + i modulo
    2**32.
    """

    model: Name | None = None
    max_tokens: int | None = Field(None, ge=1, lt=2**31)
    temperature: float | None = Field(1.0, ge=0, le=1e4)
    top_p: float | None = Field(1.0, gt=0, le=1)
    n: int | None = Field(1, ge=1, le=128)
    stream: bool | None = False
    stream_options: StreamOptions | None = None
    stop: (
        Annotated[str, Field(min_length=1, max_length=1000)]
        | Annotated[list[Annotated[str, Field(min_length=1, max_length=1000)]], Field(fail_fast=True, max_length=16)]
        | None
    ) = None
    seed: int | None = Field(None, ge=-(2**63), lt=2**63)
    top_k: int | None = Field(0, ge=-1, lt=2**31)
    min_p: float | None = Field(0.0, ge=0, le=1)
    stop_token_ids: Annotated[list[Token], Field(fail_fast=True, max_length=256)] | None = None
    ignore_eos: bool = False
    prompt_logprobs: int | None = Field(None, ge=0, le=MAX_LOGPROBS)
    return_token_ids: bool = False
    user: Annotated[str, Field(max_length=4096)] | None = None
    presence_penalty: Annotated[Any, Only(None, 0, 0.0)] = None
    frequency_penalty: Annotated[Any, Only(None, 0, 0.0)] = None
    repetition_penalty: Annotated[Any, Only(None, 1, 1.0)] = None
    logit_bias: Annotated[Any, Only(None, {})] = None
    response_format: Annotated[Any, Only(None, {"type": "text"})] = None
    service_tier: Annotated[Any, Only(None, "auto", "default")] = None

    @model_validator(mode="after")
    def _check(self) -> Generation:
        if self.stream_options is not None and not self.stream:
            raise ValueError("stream_options goes with stream=true")
        return self

    def sampling(
        self, index: int, max_tokens: int | None, logprobs: int | None, prompt_logprobs: int | None
    ) -> SamplingParams:
        """Returns the parameters of choice `index`. Raises ConfigError."""
        return SamplingParams(
            max_tokens=max_tokens,
            temperature=1.0 if self.temperature is None else self.temperature,
            top_k=max(0, self.top_k or 0),
            top_p=1.0 if self.top_p is None else self.top_p,
            min_p=self.min_p or 0.0,
            seed=None if self.seed is None else (self.seed + index) % 2**32,
            stop=self.stop or (),
            stop_token_ids=self.stop_token_ids or (),
            ignore_eos=self.ignore_eos,
            logprobs=logprobs,
            prompt_logprobs=prompt_logprobs,
        )

    @property
    def choices(self) -> int:
        """Number of choices for each prompt."""
        return self.n or 1


class CompletionBody(Generation):
    """Body of /v1/completions. `prompt`: a text, token ids, or a list of either."""

    prompt: (
        str
        | Tokens
        | Annotated[list[str], Field(fail_fast=True, min_length=1), at_most(MAX_PROMPTS)]
        | Annotated[list[Tokens], Field(fail_fast=True, min_length=1), at_most(MAX_PROMPTS)]
    )
    logprobs: int | None = Field(None, ge=0, le=MAX_LOGPROBS)
    echo: bool | None = False
    best_of: int | None = Field(None, ge=1)
    suffix: Annotated[Any, Only(None, "")] = None

    @model_validator(mode="after")
    def _check_completion(self) -> CompletionBody:
        if self.best_of is not None and self.best_of != self.choices:
            raise ValueError("best_of must equal n: choices are not ranked")
        if self.echo and None not in (self.logprobs, self.prompt_logprobs) and self.logprobs != self.prompt_logprobs:
            raise ValueError("prompt_logprobs must equal logprobs: with echo, both are of the prompt")
        return self

    @property
    def prompts(self) -> list[str | list[int]]:
        """The prompts, one or several."""
        several = not isinstance(self.prompt, str) and not isinstance(self.prompt[0], int)
        return list(self.prompt) if several else [self.prompt]  # type: ignore[arg-type,list-item]


class TextPart(Body):
    """A part of a message's content."""

    type: Literal["text"]
    text: str


class Message(Body):
    """A message of a chat. The model's template decides which roles exist. Fields that only answers have are accepted
    if they are empty."""

    role: Text
    content: str | Annotated[list[TextPart], Field(fail_fast=True), at_most(MAX_MESSAGES)] | None = None
    name: Text | None = None
    type: Annotated[Any, Only(None, "text", "message")] = None
    tool_calls: Annotated[Any, Only(None, [])] = None
    function_call: Annotated[Any, Only(None)] = None

    def for_template(self) -> dict[str, Any]:
        content = self.content or ""
        text = content if isinstance(content, str) else "".join(part.text for part in content)
        return {"role": self.role, "content": text} | ({} if self.name is None else {"name": self.name})


class ChatBody(Generation):
    """Body of /v1/chat/completions."""

    messages: Annotated[
        list[Message], Field(fail_fast=True, min_length=1, max_length=MAX_MESSAGES), at_most(MAX_MESSAGES)
    ]
    max_completion_tokens: int | None = Field(None, ge=1, lt=2**31)
    logprobs: bool | None = False
    top_logprobs: int | None = Field(None, ge=0, le=MAX_LOGPROBS)
    chat_template_kwargs: Annotated[dict[str, Any], Field(max_length=MAX_FIELDS)] | None = None
    add_generation_prompt: bool = True
    metadata: Annotated[dict[str, str], Field(max_length=16), at_most(16)] | None = None
    tools: Annotated[Any, Only(None, [])] = None
    tool_choice: Annotated[Any, Only(None, "none", "auto")] = None
    parallel_tool_calls: Annotated[Any, Only(None, True, False)] = None
    functions: Annotated[Any, Only(None, [])] = None
    function_call: Annotated[Any, Only(None, "none", "auto")] = None
    modalities: Annotated[Any, Only(None, [], ["text"])] = None
    store: Annotated[Any, Only(None, False)] = None

    @model_validator(mode="after")
    def _check_chat(self) -> ChatBody:
        if self.top_logprobs is not None and not self.logprobs:
            raise ValueError("top_logprobs goes with logprobs=true")
        if None not in (self.max_tokens, self.max_completion_tokens) and self.max_tokens != self.max_completion_tokens:
            raise ValueError("max_tokens and max_completion_tokens (its newer name) contradict each other")
        return self


class LoadBody(Body):
    """Body of /v1/load_lora_adapter. load_inplace: replace the content of a name in use; otherwise it is refused."""

    lora_name: Name
    lora_path: Annotated[str, Field(min_length=1, max_length=4096)]
    load_inplace: bool = False


class UnloadBody(Body):
    """Body of /v1/unload_lora_adapter. drain_seconds: longest wait for requests under way to end."""

    lora_name: Name
    drain_seconds: float | None = Field(None, ge=0, le=3600)
