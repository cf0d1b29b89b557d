"""Settings checked against the annotations of their fields."""

from __future__ import annotations

import math
import types
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields, is_dataclass
from difflib import get_close_matches
from functools import wraps
from pathlib import Path
from typing import Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints

from slora_jax.errors import ConfigError


@dataclass(frozen=True)
class Range:
    """Bounds of a number, as in `Annotated[int, Range(1)]`; both are allowed, `low` only if not `is_open`."""

    low: float
    high: float = math.inf
    is_open: bool = False

    def __contains__(self, number: float) -> bool:
        return self.low <= number <= self.high and not (self.is_open and number == self.low)

    def __str__(self) -> str:
        if self.high < math.inf:
            return f"in {'(' if self.is_open else '['}{self.low}, {self.high}]"
        return f"greater than {self.low}" if self.is_open else f"at least {self.low}"


def typed(value: Any, kind: Any, where: str) -> Any:
    """`value` as an instance of the annotation `kind`: lists become tuples, integers floats, text paths, and mappings
    dataclasses (by their `from_mapping(value, where)`, if they have one).

    where: the field's dotted name, for the error.

    Raises:
      ConfigError: it is of another type, out of its `Range`, or none of a `Literal`'s values.
    """
    origin, inner = get_origin(kind), get_args(kind)
    if origin is Annotated:
        value = typed(value, inner[0], where)
        for bounds in inner[1:]:
            if isinstance(bounds, Range) and value not in bounds:
                raise ConfigError(f"{where}={value!r}: must be {bounds}")
        return value
    if origin in (Union, types.UnionType):
        if value is None and types.NoneType in inner:
            return None
        return typed(value, next(one for one in inner if one is not types.NoneType), where)
    if origin is Literal:
        if value not in inner:
            raise ConfigError(f"{where}={value!r}: must be {_listed(inner)}{nearest(value, inner)}")
        return value
    if origin is tuple:
        if not isinstance(value, list | tuple):
            raise ConfigError(f"{where}={value!r}: must be a list")
        if inner[-1] is not Ellipsis and len(value) != len(inner):
            raise ConfigError(f"{where}={list(value)!r}: must have {len(inner)} values")
        kinds = [inner[0]] * len(value) if inner[-1] is Ellipsis else inner
        return tuple(typed(one, k, f"{where}[{i}]") for i, (one, k) in enumerate(zip(value, kinds, strict=True)))
    if origin is not None and issubclass(origin, Mapping):
        if not isinstance(value, Mapping):
            raise ConfigError(f"{where}={value!r}: must be a mapping")
        return dict(value)
    if isinstance(kind, type) and is_dataclass(kind) and not isinstance(value, kind):
        return kind.from_mapping(value, where) if hasattr(kind, "from_mapping") else made(kind, value, where)
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if kind is Path and isinstance(value, str):
        return Path(value)
    if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
        raise ConfigError(f"{where}={value!r}: must be {_NAMES.get(kind, kind.__name__)}")
    return value


def made[T](kind: type[T], data: Any, where: str) -> T:
    """A dataclass from a mapping of its fields. where: its dotted name, "" at the top.

    Raises:
      ConfigError: `data` is not a mapping; a field is unknown, or `typed` refuses its value.
    """
    if not isinstance(data, Mapping):
        raise ConfigError(f"{where}={data!r}: must be a mapping")
    hints, prefix = get_type_hints(kind, include_extras=True), where and f"{where}."
    refuse_unknown(data, hints, prefix)
    return kind(**{name: typed(value, hints[name], f"{prefix}{name}") for name, value in data.items()})


def check_fields(settings: Any, prefix: str = "") -> None:
    """For `__post_init__` of a dataclass: sets every field to its `typed` value. prefix: of the names in errors."""
    for name, kind in get_type_hints(type(settings), include_extras=True).items():
        object.__setattr__(settings, name, typed(getattr(settings, name), kind, prefix + name))


def is_sweep(value: Any, kind: Any) -> bool:
    """Whether a list given for a field is one of values to try in turn: any list, unless the field itself takes a list;
    then a list of lists."""
    return isinstance(value, list) and (not _takes_list(kind) or any(isinstance(one, list) for one in value))


def refuse_unknown(given: Iterable[str], known: Iterable[str], where: str) -> None:
    """Raises ConfigError for the first name that is not known, with the nearest one that is."""
    known = list(known)
    for name in given:
        if name not in known:
            raise ConfigError(f"{where}{name} is unknown{nearest(name, known)}; there are {', '.join(known)}")


def checks_keywords[T](kind: type[T]) -> type[T]:
    """Class decorator of a dataclass: a keyword that is no field raises ConfigError, with the nearest one that is."""
    made, known = kind.__init__, [field.name for field in fields(kind)]  # type: ignore[arg-type]

    @wraps(made)
    def init(self: T, *args: Any, **given: Any) -> None:
        if not given.keys() <= set(known):
            refuse_unknown(given, known, f"{kind.__name__}.")
        made(self, *args, **given)

    kind.__init__ = init  # type: ignore[method-assign, assignment]
    return kind


def nearest(name: Any, known: Iterable[Any]) -> str:
    """A hint at the known name that is most like `name`, for the end of an error; "" if none is."""
    near = get_close_matches(str(name), [str(one) for one in known], n=1)
    return f" (did you mean {near[0]!r}?)" if near else ""


_NAMES = {int: "an integer", float: "a number", str: "text", bool: "true or false", Path: "a path"}


def _takes_list(kind: Any) -> bool:
    if get_origin(kind) in (Union, types.UnionType):
        return any(_takes_list(one) for one in get_args(kind))
    return get_origin(kind) is tuple


def _listed(values: Iterable[Any]) -> str:
    return " or ".join(map(repr, values))
