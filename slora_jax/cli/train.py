"""`slora train`: trains the adapters of a recipe, all together, on one base model."""

from __future__ import annotations

import argparse
import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from slora_jax.cli.values import MODEL_HELP, model_path
from slora_jax.cli.verbose import add_verbose_option, observe_phases

if TYPE_CHECKING:
    from slora_jax.training.run import Course


def add_parser(commands: argparse._SubParsersAction) -> None:
    """Adds the command."""
    parser = commands.add_parser(
        "train",
        help="train many adapters together",
        description="Trains the adapters of a config file together on one base model, and writes a PEFT directory for "
        "each. An interrupted run continues with the same command. Exit status 1: an adapter was stopped.",
    )
    option = parser.add_argument
    option("model_dir", metavar="MODEL", type=model_path, help=MODEL_HELP)
    option("--config", metavar="FILE", type=Path, required=True, help="YAML file: adapters, their data, settings")
    option("--restart", action="store_true", help="remove the checkpoint of an earlier run and start anew")
    add_verbose_option(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Trains, and prints a table. Returns 1 if an adapter was stopped, else 0."""
    observe_phases(args)
    from slora_jax.training.recipe import Recipe

    recipe = Recipe.from_file(args.config)
    from slora_jax.training.launch import train

    courses = train(args.model_dir, recipe, args.restart)
    print(table(courses))
    print(f"adapters, log and curves: {os.path.normpath(recipe.output)}")
    return int(any(course.stopped is not None for course in courses.values()))


def table(courses: Mapping[str, Course]) -> str:
    """Returns a table of losses, with one line for each adapter."""
    rows = [("adapter", "steps", "loss", "evaluation", "best at", "")]
    for name, course in courses.items():
        stopped = f"stopped: {course.stopped}" if course.stopped is not None else ""
        early = "" if stopped or course.step == course.total else f"ended early, of {course.total} steps"
        best = "" if course.best_loss is None else f"{course.best_loss:.4f} ({course.best_step})"
        losses = f"{_number(course.first_loss)} -> {_number(course.last_loss)}"
        rows.append((name, str(course.step), losses, _number(course.evaluation_loss), best, stopped or early))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ("  ".join(f"{text:<{width}}" for text, width in zip(row, widths, strict=True)) for row in rows)
    return "\n".join(line.rstrip() for line in lines)


def _number(loss: float | None) -> str:
    return "" if loss is None else f"{loss:.4f}"
