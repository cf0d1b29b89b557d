"""Checks settings against the types and ranges in their annotations."""

from __future__ import annotations

import types
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, fields, is_dataclass
from difflib import get_close_matches
from functools import cache, wraps
from pathlib import Path
from typing import Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints

from slora_jax.errors import ConfigError

FORMER_NAMES = {
    "max_seqs": "max_num_seqs",
    "max_tokens": "max_num_batched_tokens",
    "max_tokens_per_step": "max_num_batched_tokens",
    "memory_fraction": "gpu_memory_utilization",
    "tp": "tensor_parallel_size",
    "max_rank": "max_lora_rank",
    "upload_pages": "upload_pages_per_step",
    "host_bytes": "host_adapter_bytes",
}
"""Former name of a setting -> present name, for the errors of `refuse_unknown`."""


@dataclass(frozen=True)
class Range:
    """Bounds of a number, for `typing.Annotated`: `least` and `most` are inclusive, `above` is exclusive."""

    least: float | None = None
    most: float | None = None
    above: float | None = None

    def __contains__(self, value: float) -> bool:
        return (
            (self.least is None or value >= self.least)
            and (self.most is None or value <= self.most)
            and (self.above is None or value > self.above)
        )

    def allowed(self, kind: str) -> str:
        """Describes the allowed values in an error; `kind` is "a number" or "an integer"."""
        if self.most is not None:
            return f"{kind} in {'[' if self.above is None else '('}{self.least or self.above or 0}, {self.most}]"
        return f"{kind} of at least {self.least}" if self.above is None else f"{kind} above {self.above}"


Count = Annotated[int, Range(least=1)]
Natural = Annotated[int, Range(least=0)]
Share = Annotated[float, Range(above=0, most=1)]
Positive = Annotated[float, Range(above=0)]
Seconds = Annotated[float, Range(least=0)]


def typed(value: Any, kind: Any, where: str) -> Any:
    """Converts `value` to the annotation `kind`: lists to tuples, integers to floats, text to paths, and mappings to
    dataclasses (by their `from_mapping(value, where)`, if they have one).

    Args:
      where: the field's dotted name, for the error.

    Raises:
      ConfigError: the value has another type, is out of range, or is not one of a `Literal`'s values.
    """
    try:
        return _converted(value, kind, where)
    except _MismatchError as mismatch:
        raise ConfigError(f"{where}{mismatch.at}={mismatch.value!r}: must be {mismatch}") from None


def made[T](kind: Callable[..., T], data: Any, where: str) -> T:
    """Builds a dataclass from a mapping of its fields.

    Args:
      where: the dataclass's dotted name, for errors; "" at the top level.

    Raises:
      ConfigError: `data` is not a mapping, a field is unknown, or `typed` rejects its value.
    """
    if not isinstance(data, Mapping):
        raise ConfigError(f"{where}={data!r}: must be a mapping")
    hints, prefix = _annotations(kind), where and f"{where}."
    refuse_unknown(data, hints, prefix)
    return kind(**{name: typed(value, hints[name], f"{prefix}{name}") for name, value in data.items()})


def check_fields(settings: Any, prefix: str | None = None) -> None:
    """Checks and converts every field of a dataclass with `typed`; for its `__post_init__`, even if it is frozen.

    Args:
      prefix: prepended to field names in errors; None: the class name and a dot.
    """
    kind: Any = type(settings)
    prefix = f"{kind.__name__}." if prefix is None else prefix
    for name, annotation in _annotations(kind).items():
        value = getattr(settings, name)
        converted = typed(value, annotation, f"{prefix}{name}")
        if converted is not value:
            object.__setattr__(settings, name, converted)


def is_sweep(value: Any, kind: Any) -> bool:
    """Returns whether `value` lists values to sweep for a field of annotation `kind`: any list does, or, if the field
    itself takes a list, any list that contains lists."""
    return isinstance(value, list) and (not _takes_list(kind) or any(isinstance(one, list) for one in value))


def refuse_unknown(given: Iterable[str], known: Iterable[str], where: str) -> None:
    """Raises ConfigError for the first unknown name; the message gives its present name or the nearest known one."""
    known = list(known)
    for name in given:
        if name not in known:
            now = FORMER_NAMES.get(name)
            if now in known:
                raise ConfigError(f"{where}{name} is called {now} now")
            raise ConfigError(f"{where}{name} is unknown{nearest(name, known)}; there are {', '.join(known)}")


def checks_keywords[T](kind: type[T]) -> type[T]:
    """Class decorator: an unknown keyword of the constructor raises ConfigError, which suggests the nearest field."""
    made, known = kind.__init__, [field.name for field in fields(kind)]  # type: ignore[arg-type]

    @wraps(made)
    def init(self: T, *args: Any, **given: Any) -> None:
        if not given.keys() <= set(known):
            refuse_unknown(given, known, f"{kind.__name__}.")
        made(self, *args, **given)

    kind.__init__ = init  # type: ignore[method-assign, assignment]
    return kind


def nearest(name: Any, known: Iterable[Any]) -> str:
    """Returns " (did you mean ...?)" with the known name most like `name`, for the end of an error; "" if none is."""
    near = get_close_matches(str(name), [str(one) for one in known], n=1)
    return f" (did you mean {near[0]!r}?)" if near else ""


class _MismatchError(Exception):
    """A value does not match its annotation; `expected` is what it must be, `at` its index within the field."""

    def __init__(self, value: Any, expected: str, at: str = "") -> None:
        super().__init__(expected)
        self.value, self.at = value, at


@cache
def _annotations(kind: Any) -> dict[str, Any]:
    hints = get_type_hints(kind, include_extras=True)
    return {field.name: hints[field.name] for field in fields(kind)}


def _converted(value: Any, kind: Any, where: str) -> Any:
    """Implements `typed`; `where` prefixes errors in nested dataclasses."""
    origin, inner = get_origin(kind), get_args(kind)
    if kind is Any:
        return value
    if origin is Annotated:
        value = _converted(value, inner[0], where)
        if value not in inner[1]:
            raise _MismatchError(value, inner[1].allowed(_name(inner[0])))
        return value
    if origin in (Union, types.UnionType):
        return _one_of(value, inner, where)
    if origin is Literal:
        if value not in inner:
            raise _MismatchError(value, f"{_listed(inner)}{nearest(value, inner)}")
        return value
    if origin is tuple:
        return _tuple(value, inner, where)
    if origin is not None and issubclass(origin, Mapping):
        if not isinstance(value, Mapping):
            raise _MismatchError(value, "a mapping")
        return dict(value)
    if isinstance(kind, type) and is_dataclass(kind) and not isinstance(value, kind):
        return kind.from_mapping(value, where) if hasattr(kind, "from_mapping") else made(kind, value, where)
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if kind is Path and isinstance(value, str):
        return Path(value)
    if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
        raise _MismatchError(value, _name(kind))
    return value


def _one_of(value: Any, kinds: tuple[Any, ...], where: str) -> Any:
    if value is None and types.NoneType in kinds:
        return None
    kinds = tuple(kind for kind in kinds if kind is not types.NoneType)
    if any(isinstance(kind, type) and type(value) is kind for kind in kinds):
        return value
    for kind in kinds[:-1]:
        try:
            return _converted(value, kind, where)
        except _MismatchError:
            continue
    return _converted(value, kinds[-1], where)


def _tuple(value: Any, inner: tuple[Any, ...], where: str) -> tuple[Any, ...]:
    if not isinstance(value, list | tuple):
        raise _MismatchError(value, "a list")
    if inner[-1] is not Ellipsis and len(value) != len(inner):
        raise _MismatchError(list(value), f"a list of {len(inner)} values")
    kinds = [inner[0]] * len(value) if inner[-1] is Ellipsis else inner
    converted = []
    for index, (one, kind) in enumerate(zip(value, kinds, strict=True)):
        try:
            converted.append(_converted(one, kind, f"{where}[{index}]"))
        except _MismatchError as mismatch:
            raise _MismatchError(mismatch.value, str(mismatch), f"[{index}]{mismatch.at}") from None
    return tuple(converted)


_NAMES = {int: "an integer", float: "a number", str: "text", bool: "true or false", Path: "a path"}


def _name(kind: Any) -> str:
    return _NAMES.get(kind, getattr(kind, "__name__", str(kind)))


def _takes_list(kind: Any) -> bool:
    if get_origin(kind) in (Union, types.UnionType):
        return any(_takes_list(one) for one in get_args(kind))
    return get_origin(kind) is tuple


def _listed(values: Iterable[Any]) -> str:
    return " or ".join(map(repr, values))
