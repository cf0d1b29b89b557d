"""Requests, by generators that share their first arguments (`WORKLOADS`), and what the runners make of them.

A generator is a function in a file of its own, with keyword arguments only: `num_adapters`, `ranks`, `rate` (requests
per second), `duration` (seconds), `seed`, and its own. Add it to `WORKLOADS` under the name that configs use.
"""

from collections.abc import Callable

from experiments.workloads.arena import arena_like
from experiments.workloads.azure import azure
from experiments.workloads.closed import closed_loop
from experiments.workloads.conversations import conversations
from experiments.workloads.log import LogError
from experiments.workloads.real_trace import real_trace
from experiments.workloads.requests import engine_requests, simulated_requests
from experiments.workloads.shared_prefix import shared_prefix
from experiments.workloads.synthetic import synthetic
from experiments.workloads.synthetic_text import synthetic_text
from experiments.workloads.workload import BASE, NOBODY, Workload

WORKLOADS: dict[str, Callable[..., Workload]] = {
    "synthetic": synthetic,
    "synthetic_text": synthetic_text,
    "real_trace": real_trace,
    "arena_like": arena_like,
    "azure": azure,
    "shared_prefix": shared_prefix,
    "conversations": conversations,
}

__all__ = [
    "BASE",
    "NOBODY",
    "WORKLOADS",
    "LogError",
    "Workload",
    "arena_like",
    "azure",
    "closed_loop",
    "conversations",
    "engine_requests",
    "real_trace",
    "shared_prefix",
    "simulated_requests",
    "synthetic",
    "synthetic_text",
]
