"""Untrusted values in messages: cut to a length that identifies them."""

from __future__ import annotations

LONGEST = 120
"""Characters."""


def quoted(value: object) -> str:
    """`repr`, cut."""
    return clipped(repr(value))


def clipped(text: object) -> str:
    """Text, cut."""
    text = str(text)
    return text if len(text) <= LONGEST else text[: LONGEST - 3] + "..."
