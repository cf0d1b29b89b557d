"""The requests of a run: the same for both runners."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from experiments.config.schema import RunConfig
from experiments.workloads import BASE, Workload, closed_loop, find_generator
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
    if work.names is not None and run.adapters.path is not None:
        work = _with_real_names(work, run)
    if run.client.kind == "closed":
        return closed_loop(work, run.client.users, run.client.think_seconds)
    return work


def _with_real_names(work: Workload, run: RunConfig) -> Workload:
    """The log's adapters are the directories of their names. Raises ConfigError if one is missing."""
    assert work.names is not None
    names = [directory.name for directory in run.adapters.directories]
    for number in set(work.adapter.tolist()) - {BASE}:
        if work.names[number] not in names:
            raise ConfigError(
                f"workload: the log names adapter {work.names[number]!r}; {run.adapters.path} has {names[:20]}"
            )
    adapter = [BASE if number == BASE else names.index(work.names[number]) for number in work.adapter.tolist()]
    return replace(work, adapter=np.array(adapter), ranks=run.adapters.ranks[: len(names)], names=tuple(names))
