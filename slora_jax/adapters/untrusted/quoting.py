"""Shortens untrusted values in messages."""

from __future__ import annotations

LONGEST = 120
"""Most characters shown of a value."""


def quoted(value: object) -> str:
    """`repr(value)`, shortened to `LONGEST`."""
    return clipped(repr(value))


def clipped(text: object) -> str:
    """`str(text)`, shortened to `LONGEST`."""
    text = str(text)
    return text if len(text) <= LONGEST else text[: LONGEST - 3] + "..."
