"""A closed loop of clients."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from experiments.workloads.workload import NOBODY, Workload
from slora_jax import ConfigError


def closed_loop(workload: Workload, users: int, think_seconds: float = 0.0) -> Workload:
    """The requests of a workload, sent by `users` clients in turn instead of at their own times: each client sends its
    first at 0, and its next one `think_seconds` after its last was answered or given up.

    With N requests in the loop (waiting, running or being thought of), throughput X, mean latency R and thinking time
    Z, Little's law holds: N = X (R + Z).

    Raises:
      ConfigError: users below 1, think_seconds below 0; requests of the workload already follow others.
    """
    if users < 1 or not 0 <= think_seconds < np.inf:
        raise ConfigError(
            f"closed_loop: users={users}, think_seconds={think_seconds}: there must be a user, and thinking take 0 "
            "seconds or more"
        )
    if workload.after is not None:
        raise ConfigError("closed_loop: requests of this workload follow others already, as its own loop has it")
    number = np.arange(len(workload))
    first = number < users
    return replace(
        workload,
        arrival=np.where(first, 0.0, float(think_seconds)),
        after=np.where(first, NOBODY, number - users),
    )
