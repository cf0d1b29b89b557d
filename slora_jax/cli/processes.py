"""Options for serving a model on several devices and in several processes."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from slora_jax.cli.values import count
from slora_jax.errors import ConfigError

if TYPE_CHECKING:
    from slora_jax.distributed.group import ProcessGroup

_PROCESS_OPTIONS = ("coordinator", "num_processes", "process_id")


def add_parallel_options(parser: argparse.ArgumentParser) -> None:
    """Adds the options that `check_processes` and `join` read."""
    option = parser.add_argument_group("several devices, several processes").add_argument
    option(
        "--tensor-parallel-size",
        metavar="N",
        type=count,
        help="devices that share the model, in all processes together (default: 1)",
    )
    option(
        "--coordinator",
        metavar="HOST:PORT",
        help="address of process 0, which all processes connect to (it uses PORT and PORT + 1); start each process "
        "with the same command and its own --process-id; only process 0 prints",
    )
    option("--num-processes", metavar="N", type=count, help="number of processes")
    option("--process-id", metavar="I", type=int, help="index of this process, from 0")
    option("--join-timeout", metavar="S", type=float, default=300.0, help="seconds to connect (default: %(default)s)")


def check_processes(args: argparse.Namespace, tp: int) -> None:
    """Raises ConfigError if the options are incomplete or contradict each other."""
    given = [_option(name) for name in _PROCESS_OPTIONS if getattr(args, name) is not None]
    if not given:
        return
    for name in _PROCESS_OPTIONS:
        if getattr(args, name) is None:
            raise ConfigError(f"{_option(name)} is missing: it goes with {', '.join(given)}")
    if args.num_processes > 1 and tp % args.num_processes:
        raise ConfigError(f"--tensor-parallel-size={tp}: must be a multiple of --num-processes={args.num_processes}")
    if not args.join_timeout > 0:
        raise ConfigError(f"--join-timeout={args.join_timeout}: must be positive")


def join(args: argparse.Namespace) -> ProcessGroup | None:
    """Joins the processes that serve the model together; returns None if this process serves alone.

    Raises:
      ConfigError: the options are out of range, or the other processes did not connect.
    """
    if args.coordinator is None:
        return None
    from slora_jax.distributed.join import join_processes

    return join_processes(args.coordinator, args.num_processes, args.process_id, timeout=args.join_timeout)


def _option(name: str) -> str:
    return f"--{name.replace('_', '-')}"
