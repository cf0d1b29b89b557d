"""The command line's parser, with errors that name the option."""

from __future__ import annotations

import argparse
import re
import sys
from typing import Any, NoReturn

from slora_jax.cli import chat, compile_report, demo, generate, serve, train
from slora_jax.errors import ConfigError
from slora_jax.typed import FORMER_NAMES


class Parser(argparse.ArgumentParser):
    """Raises `ConfigError` for a usage error: one line that names the option, its value and the allowed values."""

    def __init__(self, **settings: Any) -> None:
        super().__init__(**settings, allow_abbrev=False)  # or the former --tp would mean --tp-lora

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        known, unknown = super().parse_known_args(args, namespace)
        for text in unknown:
            option = text.split("=")[0]
            now = FORMER_NAMES.get(option.removeprefix("--").replace("-", "_"), "").replace("_", "-")
            if f"--{now}" in self._option_string_actions:
                self.error(f"{option} is called --{now} now")
        return known, unknown

    def error(self, message: str) -> NoReturn:
        message = message.removeprefix("argument ").replace(": =", "=", 1)
        message = re.sub(r": invalid choice: (.*) \(choose from (.*)\)$", r"=\1: must be one of \2", message)
        message = re.sub(r": invalid int value: (.*)$", r"=\1: must be an integer", message)
        message = re.sub(r": invalid float value: (.*)$", r"=\1: must be a number", message)
        raise ConfigError(f"{message} ({self.prog} --help)")


class _Version(argparse.Action):
    """Prints the version, looked up only on demand since that takes longer than all other parsing."""

    def __call__(self, parser: argparse.ArgumentParser, *_: Any) -> NoReturn:
        from importlib.metadata import version

        print(f"slora-jax {version('slora-jax')}", file=sys.stdout)
        parser.exit()


def make_parser() -> Parser:
    """Returns the parser of all commands. Its result `args` has `args.run(args)`, which returns the exit status."""
    parser = Parser(prog="slora", description="One base model, thousands of LoRA adapters, one unified paged pool.")
    parser.add_argument("--version", action=_Version, nargs=0, help="show the version and exit")
    commands = parser.add_subparsers(metavar="COMMAND", required=True)
    for command in (demo, generate, chat, serve, train, compile_report):
        command.add_parser(commands)
    return parser


def with_options(message: str, args: argparse.Namespace | None) -> str:
    """Returns an error's message, with a field at its beginning replaced by the option that set it."""
    field = re.match(r"(?:EngineConfig\.|SamplingParams\.)?(\w+)=", message)
    if args is None or field is None:
        return message
    fields: dict[str, str] = getattr(args, "fields", {})
    name = fields.get(field[1], field[1])
    if name == "model_dir" or getattr(args, name, None) is None:
        return message
    return f"--{name.replace('_', '-')}={message[field.end() :]}"
