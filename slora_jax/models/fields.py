"""Reads the fields of a Hugging Face `config.json`: honours, ignores or rejects each by name."""

from __future__ import annotations

import json
import warnings
from collections.abc import Iterable, Mapping
from typing import Any

from slora_jax.errors import UnsupportedModelError
from slora_jax.models.config_fields import CHANGES_LOGITS, HARMLESS_FIELDS, INACTIVE, NEUTRAL_VALUES


class Fields:
    """The fields of one file. It remembers which have been read.

    Args:
      given: the file's content.
      defaults: values of fields that the file lacks.
    """

    def __init__(self, given: Mapping[str, Any], defaults: Mapping[str, Any] | None = None) -> None:
        self.given = given
        self.defaults = defaults or {}
        self._read: set[str] = set()

    def get(self, name: str) -> Any:
        """The field's value, its default, or None."""
        self._read.add(name)
        return self.given.get(name, self.defaults.get(name))

    def positive_int(self, name: str) -> int:
        return positive_int(name, self.get(name))

    def positive_number(self, name: str) -> float:
        return positive_number(name, self.get(name))

    def optional_number(self, name: str) -> float | None:
        """A positive number, or None for null, false or 0."""
        value = self.get(name)
        return None if value in INACTIVE else positive_number(name, value)

    def boolean(self, name: str) -> bool:
        value = self.get(name)
        if value is not None and not isinstance(value, bool):
            raise refused(name, value, "true or false")
        return bool(value)

    def choice[T](self, name: str, values: Mapping[str, T]) -> T:
        """Returns the entry of `values` for the field's value."""
        value = self.get(name)
        if value not in values:
            raise refused(name, value, " or ".join(map(repr, values)))
        return values[value]

    def per_layer(self, name: str, num_layers: int, allowed: tuple[Any, ...]) -> tuple[Any, ...] | None:
        """Returns one of `allowed` for each layer, or None for null."""
        values = self.get(name)
        if values is None:
            return None
        is_list = isinstance(values, list | tuple) and len(values) >= num_layers
        if not is_list or any(value not in allowed for value in values):
            one_of = " or ".join(map(_json, allowed))
            raise refused(name, values, f"{one_of} for each of the {num_layers} layers")
        return tuple(values[:num_layers])

    def check_rest(self, implied: Iterable[str] = ()) -> None:
        """Rejects fields that would change the computation and have not been read; warns of other unknown fields.

        Args:
          implied: names of switches that may be true, because the feature is always on.
        """
        unknown = []
        for field, value in self.given.items():
            if field in self._read or (value is True and field in implied):
                continue
            if field in NEUTRAL_VALUES or (field not in HARMLESS_FIELDS and CHANGES_LOGITS.search(field)):
                neutral = NEUTRAL_VALUES.get(field, INACTIVE)
                if value not in neutral:
                    allowed = "null, false, 0 or empty" if neutral is INACTIVE else " or ".join(map(_json, neutral))
                    raise refused(field, value, allowed)
            elif field not in HARMLESS_FIELDS and value not in INACTIVE:
                unknown.append(field)
        if unknown:
            warnings.warn(
                f"config.json: {', '.join(unknown)}: not known, and ignored; if the model needs one of these fields, "
                "its outputs are wrong",
                stacklevel=4,
            )


def refused(field: str, value: Any, supported: str) -> UnsupportedModelError:
    """The error of a field's value; `supported` says which values are."""
    return UnsupportedModelError(f"config.json: {field}={value!r} is not supported; supported: {supported}")


def positive_int(name: str, value: Any) -> int:
    """Returns the value of the field `name` if it is a positive integer."""
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise refused(name, value, "a positive integer")
    return value


def positive_number(name: str, value: Any) -> float:
    """Returns the value of the field `name` if it is a positive number."""
    if not isinstance(value, int | float) or isinstance(value, bool) or not value > 0:
        raise refused(name, value, "a positive number")
    return float(value)


def token_ids(value: Any) -> tuple[int, ...]:
    """Reads `eos_token_id`."""
    ids = tuple(value) if isinstance(value, list | tuple) else () if value is None else (value,)
    if not all(isinstance(token, int) and not isinstance(token, bool) for token in ids):
        raise refused("eos_token_id", value, "an integer, a list of integers, or null")
    return ids


def _json(value: Any) -> str:
    return repr(value) if isinstance(value, str) else json.dumps(value)
