"""Untrusted regular expressions: Python's `re` syntax, matched by an engine with a time limit.

`re` holds the interpreter's lock while it matches, and a few nested repetitions can take hours.
"""

from __future__ import annotations

import re
import time
from typing import Any, Protocol

import regex  # type: ignore[import-untyped]

from slora_jax.adapters.untrusted.quoting import clipped, quoted
from slora_jax.errors import AdapterError

MAX_LENGTH = 4000
"""Longest expression, in characters."""

SECONDS = 0.5
"""Processor time for all matches of one adapter. Ordinary expressions take milliseconds."""

_INCOMPATIBLE = re.compile(r"\[:|\{[^\d,}]")
"""POSIX classes and fuzzy matches: syntax of `regex` with another meaning in `re`."""

_LONG_REPEAT = re.compile(r"\{[\d,\s]*\d{4}")

_PLAIN = re.compile(r"(?:\(\.\*\\\.\)\?\()?[\w.]*(?:\)\$)?")
"""A plain name, perhaps wrapped by `config.pattern_regex`: safe for `re`, which compiles it five times faster."""


class _Match(Protocol):
    def __getitem__(self, group: str, /) -> Any: ...


def check_pattern(field: str, pattern: str) -> None:
    """Raises AdapterError unless `re` accepts the expression and its length and repetitions are within bounds."""
    reason: object = None
    if len(pattern) > MAX_LENGTH:
        reason = f"it has {len(pattern)} characters; at most {MAX_LENGTH} are read"
    elif _LONG_REPEAT.search(pattern):
        reason = "it repeats more than 999 times, and no module's name is that long"
    elif _INCOMPATIBLE.search(pattern):
        reason = "'[:' and '{' before anything but a number are not supported"
    else:
        try:
            re.compile(pattern)
        except (re.error, RecursionError, OverflowError) as error:
            reason = error
    if reason is not None:
        raise AdapterError(f"{field}: {quoted(pattern)} is not a regular expression: {clipped(reason)}") from None


class Matcher:
    """Matches one adapter's expressions, within `seconds` of processor time for all matches together."""

    def __init__(self, seconds: float = SECONDS) -> None:
        self._left = seconds
        self._compiled: dict[str, re.Pattern[str] | regex.Pattern[str]] = {}

    def fullmatch(self, field: str, pattern: str, name: str) -> bool:
        """Like `re.fullmatch`. Raises AdapterError naming field and expression when the time is used up."""
        return self._run(field, pattern, name, "fullmatch") is not None

    def match(self, field: str, pattern: str, name: str) -> _Match | None:
        """Like `re.match`. Raises AdapterError like `fullmatch`."""
        return self._run(field, pattern, name, "match")

    def _run(self, field: str, pattern: str, name: str, how: str) -> _Match | None:
        compiled = self._compiled.get(pattern)
        if compiled is None and _PLAIN.fullmatch(pattern):
            compiled = self._compiled[pattern] = re.compile(pattern)
        if isinstance(compiled, re.Pattern):
            return compiled.fullmatch(name) if how == "fullmatch" else compiled.match(name)
        start = time.thread_time()
        try:
            if compiled is None:
                compiled = self._compiled[pattern] = regex.compile(pattern, regex.V0, cache_pattern=False)
            match: _Match | None = getattr(compiled, how)(name, timeout=max(self._left, 1e-3))
        except TimeoutError:
            self._left = 0.0
            match = None
        except (regex.error, RecursionError, OverflowError, MemoryError) as error:
            raise AdapterError(f"{field}: {quoted(pattern)} cannot be matched: {clipped(error)}") from None
        self._left -= time.thread_time() - start
        if self._left <= 0:
            raise AdapterError(
                f"{field}: {quoted(pattern)}: matching the adapter's expressions with the module names took more than "
                f"{SECONDS} s of processor time; write them without nested repetitions, or as a list of names"
            )
        return match
