"""A closed loop of clients."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from experiments.workloads.workload import INDEPENDENT, Workload
from slora_jax import ConfigError


def closed_loop(workload: Workload, users: int, think_seconds: float = 0.0) -> Workload:
    """Returns the requests of a workload, sent by `users` clients in turn instead of at their own times: each client
    sends its first request at 0, and the next one `think_seconds` after the end of the last.

    With N clients, throughput X, mean latency R and thinking time Z, Little's law holds: N = X (R + Z).

    Raises:
      ConfigError: users below 1, think_seconds below 0; requests of the workload already follow others.
    """
    if users < 1 or not 0 <= think_seconds < np.inf:
        raise ConfigError(
            f"closed_loop: users={users}, think_seconds={think_seconds}: users must be at least 1, think_seconds at "
            "least 0 and finite"
        )
    if workload.after is not None:
        raise ConfigError("closed_loop: the workload has a loop of its own: its requests follow others already")
    number = np.arange(len(workload))
    first = number < users
    return replace(
        workload,
        arrival=np.where(first, 0.0, float(think_seconds)),
        after=np.where(first, INDEPENDENT, number - users),
    )
