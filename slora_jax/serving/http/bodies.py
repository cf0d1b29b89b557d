"""Request bodies: OpenAI's fields, and vLLM's names for fields that OpenAI lacks.

An unknown field is refused, and so is a field that asks for something the engine cannot do, so that no answer silently
ignores a field. An empty field is accepted: clients send null, and send answers back as messages.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from slora_jax.scheduling import MAX_LOGIT_BIAS, MAX_LOGPROBS, SamplingParams, StructuredOutputs
from slora_jax.serving.http.body import (
    MAX_FIELDS,
    MAX_MESSAGES,
    MAX_PROMPTS,
    MAX_TOOLS,
    Body,
    Name,
    Only,
    Schema,
    Text,
    Token,
    Tokens,
    at_most,
    one_or_several,
)
from slora_jax.serving.http.messages import ChosenTool, Message, Tool


class StreamOptions(Body):
    """include_usage: the last event has the usage. continuous_usage_stats: every event has it."""

    include_usage: bool = False
    continuous_usage_stats: bool = False
    include_obfuscation: bool = False


class JsonSchema(Body):
    """A JSON schema of OpenAI's response_format. It is always followed exactly, whatever `strict` is."""

    name: Text | None = None
    description: Annotated[str, Field(max_length=4096)] | None = None
    json_schema: Schema = Field(alias="schema")
    strict: bool | None = None


class ResponseFormat(Body):
    """OpenAI's response_format."""

    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchema | None = None

    @model_validator(mode="after")
    def _check(self) -> ResponseFormat:
        if (self.type == "json_schema") != (self.json_schema is not None):
            raise ValueError('json_schema goes with type="json_schema", and that type with json_schema')
        return self


class StructuredBody(Body):
    """vLLM's structured_outputs (see `StructuredOutputs`)."""

    json_text: str | Schema | None = Field(None, alias="json")
    json_object: bool | None = None
    regex: str | None = None
    choice: list[str] | None = None
    grammar: str | None = None


class Generation(Body):
    """Fields that completions and chat share.

    Beyond OpenAI's: top_k, min_p, stop_token_ids, ignore_eos, prompt_logprobs, structured_outputs (see
    `SamplingParams`), vLLM's older names guided_* for the latter, and return_token_ids (each choice then has
    `token_ids`). With a seed, choice i of each prompt uses seed + i modulo
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
    priority: int | None = Field(None, ge=-(2**31), lt=2**31)
    user: Annotated[str, Field(max_length=4096)] | None = None
    presence_penalty: Annotated[Any, Only(None, 0, 0.0)] = None
    frequency_penalty: Annotated[Any, Only(None, 0, 0.0)] = None
    repetition_penalty: Annotated[Any, Only(None, 1, 1.0)] = None
    logit_bias: (
        Annotated[
            dict[Annotated[str, Field(pattern="^[0-9]{1,9}$")], Annotated[float, Field(ge=-100, le=100)]],
            at_most(MAX_LOGIT_BIAS),
        ]
        | None
    ) = None
    response_format: ResponseFormat | None = None
    structured_outputs: StructuredBody | None = None
    guided_json: str | Schema | None = None
    guided_regex: str | None = None
    guided_choice: list[str] | None = None
    guided_grammar: str | None = None
    service_tier: Annotated[Any, Only(None, "auto", "default")] = None

    @model_validator(mode="after")
    def _check(self) -> Generation:
        if self.stream_options is not None and not self.stream:
            raise ValueError("stream_options goes with stream=true")
        if len(names := self.forms) > 1:
            raise ValueError(f"{' and '.join(names)}: give one of them, since each says what the text must be")
        return self

    @property
    def forms(self) -> dict[str, dict[str, Any]]:
        """The form that the text must have: arguments of `StructuredOutputs`, by the field that has them."""
        forms: dict[str, dict[str, Any]] = {
            f"guided_{name}": {name: value}
            for name in ("json", "regex", "choice", "grammar")
            if (value := getattr(self, f"guided_{name}")) is not None
        }
        if self.structured_outputs is not None:
            given = self.structured_outputs.model_dump(exclude_none=True, by_alias=True)
            if given:
                forms["structured_outputs"] = given
        if self.response_format is not None and self.response_format.type != "text":
            schema = self.response_format.json_schema
            forms["response_format"] = {"json_object": True} if schema is None else {"json": schema.json_schema}
        return forms

    def sampling(
        self,
        index: int,
        max_tokens: int | None,
        logprobs: int | None,
        prompt_logprobs: int | None,
        form: StructuredOutputs | None,
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
            structured_outputs=form,
            logit_bias={int(token): bias for token, bias in (self.logit_bias or {}).items()},
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
        return one_or_several(self.prompt)


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
    tools: Annotated[list[Tool], Field(fail_fast=True), at_most(MAX_TOOLS)] | None = None
    tool_choice: Literal["none", "auto", "required"] | ChosenTool | None = None
    parallel_tool_calls: Annotated[Any, Only(None, True, False)] = None
    functions: Annotated[Any, Only(None, [])] = None
    function_call: Annotated[Any, Only(None, "none", "auto")] = None
    modalities: Annotated[Any, Only(None, [], ["text"])] = None
    store: Annotated[Any, Only(None, False)] = None

    @property
    def offered(self) -> list[dict[str, Any]]:
        """The tools that the model may call, as chat templates expect them."""
        tools = () if self.tool_choice == "none" else self.tools or ()
        return [tool.model_dump(exclude_unset=True) for tool in tools]

    @property
    def forced(self) -> list[str]:
        """Names of the functions of which the answer must call one; empty if it need not."""
        if isinstance(self.tool_choice, ChosenTool):
            return [self.tool_choice.function.name]
        names = [tool.function.name for tool in self.tools or ()]
        return names if self.tool_choice == "required" else []

    @model_validator(mode="after")
    def _check_chat(self) -> ChatBody:
        if self.top_logprobs is not None and not self.logprobs:
            raise ValueError("top_logprobs goes with logprobs=true")
        if self.offered and (self.stop or self.forms):
            raise ValueError("tools exclude stop and a form of the text: both would cut into calls")
        if self.tool_choice not in (None, "none", "auto") and not self.tools:
            raise ValueError("tool_choice goes with tools")
        if missing := set(self.forced) - {tool.function.name for tool in self.tools or ()}:
            raise ValueError(f"tool_choice: tools have no function {missing.pop()!r}")
        if self.offered and self.parallel_tool_calls is False and not self.forced:
            raise ValueError("parallel_tool_calls=false is not supported with tools: the model decides on its calls")
        if None not in (self.max_tokens, self.max_completion_tokens) and self.max_tokens != self.max_completion_tokens:
            raise ValueError("max_tokens and max_completion_tokens (its newer name) contradict each other")
        return self


class EmbeddingBody(Body):
    """Body of /v1/embeddings. `input`: a text, token ids, or a list of either. Beyond OpenAI's: `pooling` of the hidden
    states, and whether to `normalize` the result."""

    input: (
        str
        | Tokens
        | Annotated[list[str], Field(fail_fast=True, min_length=1), at_most(MAX_PROMPTS)]
        | Annotated[list[Tokens], Field(fail_fast=True, min_length=1), at_most(MAX_PROMPTS)]
    )
    model: Name | None = None
    encoding_format: Literal["float", "base64"] | None = "float"
    dimensions: int | None = Field(None, ge=1)
    pooling: Literal["mean", "last"] | None = "last"
    normalize: bool | None = True
    user: Annotated[str, Field(max_length=4096)] | None = None

    @property
    def inputs(self) -> list[str | list[int]]:
        """The inputs, one or several."""
        return one_or_several(self.input)


class TokenizeBody(Body):
    """vLLM's body of /tokenize: a prompt, or messages to be put into the chat template. add_special_tokens: by default
    True for a prompt and False for messages."""

    model: Name | None = None
    prompt: str | None = None
    messages: Annotated[list[Message], Field(fail_fast=True, min_length=1), at_most(MAX_MESSAGES)] | None = None
    add_generation_prompt: bool = True
    add_special_tokens: bool | None = None
    chat_template_kwargs: Annotated[dict[str, Any], Field(max_length=MAX_FIELDS)] | None = None
    return_token_strs: bool | None = False

    @model_validator(mode="after")
    def _check_input(self) -> TokenizeBody:
        if (self.prompt is None) == (self.messages is None):
            raise ValueError("give one of prompt and messages")
        return self


class DetokenizeBody(Body):
    """vLLM's body of /detokenize."""

    model: Name | None = None
    tokens: Annotated[list[Token], Field(fail_fast=True)]


class LoadBody(Body):
    """Body of /v1/load_lora_adapter. load_inplace: replace the content of a name in use; otherwise it is refused."""

    lora_name: Name
    lora_path: Annotated[str, Field(min_length=1, max_length=4096)]
    load_inplace: bool = False


class UnloadBody(Body):
    """Body of /v1/unload_lora_adapter. drain_seconds: longest wait for requests under way to end."""

    lora_name: Name
    drain_seconds: float | None = Field(None, ge=0, le=3600)
