"""The base of all request bodies: strict types, and errors that name one field."""

from __future__ import annotations

from functools import cache
from typing import Annotated, Any

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

MAX_FIELDS = 64
"""Most fields of an object; no body has as many."""
MAX_PROMPTS = 4096
MAX_MESSAGES = 10_000
MAX_TOOLS = 128


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
        *("guided_decoding_backend", "guided_whitespace_pattern", "grammar"),
        *("use_beam_search", "length_penalty", "min_tokens", "bad_words", "allowed_token_ids", "logits_processors"),
        *("truncate_prompt_tokens", "skip_special_tokens", "include_stop_str_in_output", "dry_multiplier"),
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
Schema = Annotated[dict[str, Any], Field(title="JSON schema")]


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
            names = _names(cls)
            return {name: value for name, value in data.items() if name in names or value not in NOTHING}
        return data


@cache
def _names(body: type[Body]) -> frozenset[str]:
    """Returns the fields of a body as clients write them."""
    return frozenset(field.alias or name for name, field in body.model_fields.items())


def one_or_several(given: str | list[Any]) -> list[str | list[int]]:
    """Returns a list of texts or token ids, given one or a list of them."""
    return [given] if isinstance(given, str) or isinstance(given[0], int) else list(given)
