"""The requests of a run: the same for both runners."""

from __future__ import annotations

from experiments.config.schema import RunConfig
from experiments.workloads import WORKLOADS, Workload, closed_loop


def run_workload(run: RunConfig) -> Workload:
    """Raises ConfigError (or what the generator raises) if its parameters do not fit together."""
    work = WORKLOADS[run.workload.kind](
        num_adapters=run.adapters.count,
        ranks=run.adapters.ranks,
        rate=run.workload.rate,
        duration=run.workload.duration,
        seed=run.seed,
        **run.workload.parameters,
    )
    if run.client.kind == "closed":
        return closed_loop(work, run.client.users, run.client.think_seconds)
    return work
