"""Requests, by generators that share their first arguments (`WORKLOADS`), and their forms for the runners.

A generator is a function in a file of its own, with keyword arguments only: `num_adapters`, `ranks`, `rate` (requests
per second), `duration` (seconds), `seed`, and its own. Configs name one of `WORKLOADS`, or any other as
"module:function".
"""

from collections.abc import Callable
from importlib import import_module

from experiments.workloads.arena import arena_like
from experiments.workloads.azure import azure
from experiments.workloads.batch import batch
from experiments.workloads.closed import closed_loop
from experiments.workloads.conversations import conversations
from experiments.workloads.log import LogError
from experiments.workloads.mechanisms import bursts, chats, shifting
from experiments.workloads.real_trace import real_trace
from experiments.workloads.replay import replay
from experiments.workloads.requests import (
    WorkloadRequest,
    engine_requests,
    read_requests,
    simulated_requests,
    write_requests,
)
from experiments.workloads.shared_prefix import shared_prefix
from experiments.workloads.synthetic import synthetic
from experiments.workloads.synthetic_text import synthetic_text
from experiments.workloads.workload import BASE, INDEPENDENT, Workload
from slora_jax import ConfigError
from slora_jax.typed import nearest

WORKLOADS: dict[str, Callable[..., Workload]] = {
    "synthetic": synthetic,
    "synthetic_text": synthetic_text,
    "real_trace": real_trace,
    "arena_like": arena_like,
    "azure": azure,
    "shared_prefix": shared_prefix,
    "conversations": conversations,
    "replay": replay,
    "batch": batch,
    "bursts": bursts,
    "shifting": shifting,
    "chats": chats,
}


def find_generator(kind: str) -> Callable[..., Workload]:
    """Returns a generator by its name in `WORKLOADS`, or as "module:function".

    Raises:
      ConfigError: there is no such generator.
    """
    if ":" in kind:
        module, _, function = kind.partition(":")
        try:
            return getattr(import_module(module), function)  # type: ignore[no-any-return]
        except (ImportError, AttributeError, ValueError) as error:
            raise ConfigError(f"workload.kind={kind}: {error}") from error
    if kind not in WORKLOADS:
        hint, known = nearest(kind, WORKLOADS), ", ".join(WORKLOADS)
        raise ConfigError(f"workload.kind={kind} is unknown{hint}; there are {known}, and your own as module:function")
    return WORKLOADS[kind]


__all__ = [
    "BASE",
    "INDEPENDENT",
    "WORKLOADS",
    "LogError",
    "Workload",
    "WorkloadRequest",
    "arena_like",
    "azure",
    "batch",
    "bursts",
    "chats",
    "closed_loop",
    "conversations",
    "engine_requests",
    "find_generator",
    "read_requests",
    "real_trace",
    "replay",
    "shared_prefix",
    "shifting",
    "simulated_requests",
    "synthetic",
    "synthetic_text",
    "write_requests",
]
