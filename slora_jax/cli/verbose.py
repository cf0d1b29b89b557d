"""`--verbose`: writes the duration of each phase of a start to stderr."""

from __future__ import annotations

import argparse
import sys

from slora_jax import phases


def add_verbose_option(parser: argparse.ArgumentParser) -> None:
    """Adds the option that `observe_phases` reads."""
    parser.add_argument("--verbose", action="store_true", help="write the seconds of each phase of the start to stderr")


def observe_phases(args: argparse.Namespace) -> None:
    """Writes later phases to stderr if `--verbose` was given."""
    phases.observe(_write if args.verbose else None)


def _write(name: str, seconds: float) -> None:
    print(f"slora: {name:<12} {seconds:7.2f} s", file=sys.stderr, flush=True)
