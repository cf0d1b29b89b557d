"""Kinds of option values. Their errors begin with "=", which the parser writes after the option's name."""

from __future__ import annotations

import argparse
from pathlib import Path


def count(text: str) -> int:
    """A positive integer."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"={text}: must be a positive integer")
    return int(text)


def named_directory(text: str) -> tuple[str, Path]:
    """An adapter's name and directory."""
    name, _, directory = text.partition("=")
    if not name or not directory:
        raise argparse.ArgumentTypeError(f"={text}: must be NAME=DIR")
    return name, Path(directory)
