"""Structured output: the form that a request's text must have."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any, Protocol

from slora_jax.errors import ConfigError
from slora_jax.typed import checks_keywords

if TYPE_CHECKING:  # its import takes a while
    import numpy as np


class TokenGrammar(Protocol):
    """The grammar of one request, in its state after the tokens read so far."""

    @property
    def is_complete(self) -> bool:
        """True if no token can follow."""

    def fill(self, row: np.ndarray) -> None:
        """Writes the tokens that may come next into `row`, int32 `[words]`, one bit each."""

    def accept(self, token: int) -> str | None:
        """Advances by a sampled token. Returns the reason if the grammar cannot continue, else None."""


@checks_keywords
@dataclass(frozen=True)
class StructuredOutputs:
    """The form of a request's text; the names are vLLM's. Exactly one field is set.

    Attributes:
      json: a JSON schema, as a mapping or as text; kept as text. Properties are generated in the schema's order.
      json_object: True for any JSON object.
      regex: a regular expression that the whole text matches, in the syntax of Rust's `regex`.
      choice: strings, one of which is the text.
      grammar: a context-free grammar in llguidance's dialect of Lark, or in GBNF.
    """

    json: str | Mapping[str, Any] | None = None
    json_object: bool = False
    regex: str | None = None
    choice: tuple[str, ...] | list[str] | None = None
    grammar: str | None = None

    def __post_init__(self) -> None:
        if isinstance(self.json, Mapping):
            try:
                object.__setattr__(self, "json", json.dumps(self.json))
            except (TypeError, ValueError, RecursionError) as error:
                raise ConfigError(f"{_FIELD}.json: must be a JSON schema: {error}") from None
        for name in ("json", "regex", "grammar"):
            value = getattr(self, name)
            self._require(value is None or (isinstance(value, str) and value), name, "text that is not empty, or None")
        self._require(isinstance(self.json_object, bool), "json_object", "true or false")
        if self.choice is not None:
            is_list = isinstance(self.choice, list | tuple) and all(isinstance(one, str) and one for one in self.choice)
            self._require(is_list and bool(self.choice), "choice", "a list of strings, none of them empty, or None")
            object.__setattr__(self, "choice", tuple(self.choice))
        names = [field.name for field in fields(self) if getattr(self, field.name)]
        if len(names) != 1:
            known = ", ".join(field.name for field in fields(self))
            raise ConfigError(f"{_FIELD}={' and '.join(names) or None}: must be one of {known}; give exactly one")

    @property
    def source(self) -> tuple[str, str]:
        """The format ("json", "regex", "choice" or "grammar") and its text."""
        if self.json_object:
            return "json", '{"type": "object"}'
        if self.choice is not None:
            return "choice", json.dumps(self.choice)
        return next((name, value) for name in ("json", "regex", "grammar") if (value := getattr(self, name)))

    def _require(self, condition: Any, name: str, allowed: str) -> None:
        if not condition:
            raise ConfigError(f"{_FIELD}.{name}={getattr(self, name)!r}: must be {allowed}")


_FIELD = "SamplingParams.structured_outputs"
