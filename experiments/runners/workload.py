"""The requests of a run: the same for both runners."""

from __future__ import annotations

from experiments.config.schema import RunConfig
from experiments.workloads import Workload, closed_loop, find_generator
from slora_jax import ConfigError


def run_workload(run: RunConfig) -> Workload:
    """Raises ConfigError if the generator's parameters do not fit together, or its file cannot be read."""
    try:
        work = find_generator(run.workload.kind)(
            num_adapters=run.adapters.count,
            ranks=run.adapters.ranks,
            rate=run.workload.rate,
            duration=run.workload.duration,
            seed=run.seed,
            **run.workload.parameters,
        )
    except OSError as error:
        raise ConfigError(f"workload (kind: {run.workload.kind}): {error}") from error
    if run.client.kind == "closed":
        return closed_loop(work, run.client.users, run.client.think_seconds)
    return work
