"""Options of the commands that serve a model: devices, and processes that serve it together."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from slora_jax.cli.values import count
from slora_jax.errors import ConfigError

if TYPE_CHECKING:
    from slora_jax.distributed.group import ProcessGroup

_TOGETHER = ("coordinator", "num_processes", "process_id")


def add_parallel_options(parser: argparse.ArgumentParser) -> None:
    """The options that `check_processes` and `join` read."""
    option = parser.add_argument_group("several devices, several processes").add_argument
    option(
        "--tensor-parallel-size",
        metavar="N",
        type=count,
        help="devices the model is cut over, of all processes together (default: 1)",
    )
    option(
        "--coordinator",
        metavar="HOST:PORT",
        help="address of process 0, where the processes meet (it uses PORT and PORT + 1); each is started with the "
        "same command and its own --process-id, and all but process 0 write nothing",
    )
    option("--num-processes", metavar="N", type=count, help="how many there are")
    option("--process-id", metavar="I", type=int, help="which one this is, from 0")
    option(
        "--join-timeout", metavar="SECONDS", type=float, default=300.0, help="for all to come (default: %(default)s)"
    )


def check_processes(args: argparse.Namespace, tp: int) -> None:
    """Raises ConfigError if the options are incomplete or contradict each other."""
    given = [_option(name) for name in _TOGETHER if getattr(args, name) is not None]
    if not given:
        return
    for name in _TOGETHER:
        if getattr(args, name) is None:
            raise ConfigError(f"{_option(name)} is missing: it goes with {', '.join(given)}")
    if args.num_processes > 1 and tp % args.num_processes:
        raise ConfigError(f"--tensor-parallel-size={tp}: must be a multiple of --num-processes={args.num_processes}")
    if not args.join_timeout > 0:
        raise ConfigError(f"--join-timeout={args.join_timeout}: must be positive")


def join(args: argparse.Namespace) -> ProcessGroup | None:
    """The processes that serve the model together; None: this one alone.

    Raises:
      ConfigError: the options are out of range, or the other processes cannot be met.
    """
    if args.coordinator is None:
        return None
    from slora_jax.distributed.join import join_processes

    return join_processes(args.coordinator, args.num_processes, args.process_id, timeout=args.join_timeout)


def _option(name: str) -> str:
    return f"--{name.replace('_', '-')}"
