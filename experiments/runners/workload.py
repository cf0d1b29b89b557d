"""The requests of a run: the same for every runner."""

from __future__ import annotations

import inspect
from dataclasses import replace

import numpy as np

from experiments.config.schema import RunConfig
from experiments.workloads import BASE, Workload, closed_loop, find_generator
from slora_jax import ConfigError


def run_workload(run: RunConfig, round_number: int = 0) -> Workload:
    """Generates the requests of a run, or of one round of its measurement.

    Raises:
      ConfigError: the generator's arguments do not fit together, or its file cannot be read.
    """
    generator = find_generator(run.workload.kind)
    own = {"round_number": round_number} if _continues(run) else {}
    try:
        work = generator(
            num_adapters=run.adapters.count,
            ranks=run.adapters.ranks,
            rate=run.workload.rate,
            duration=run.workload.duration,
            seed=round_seed(run, round_number),
            **own,
            **run.workload.parameters,
        )
    except OSError as error:
        raise ConfigError(f"workload (kind: {run.workload.kind}): {error}") from error
    if work.names is not None and run.adapters.path is not None:
        work = _with_real_names(work, run)
    if run.client.kind == "closed":
        return closed_loop(work, run.client.users, run.client.think_seconds)
    if round_number == 0 and run.measured is not None and run.measured.load is not None:
        return replace(work, arrival=np.zeros(len(work)))
    return work


def round_seed(run: RunConfig, round_number: int) -> int:
    """Returns the seed of one round's requests: another one each round, unless the generator itself continues."""
    return run.seed if _continues(run) else run.seed + round_number


def _continues(run: RunConfig) -> bool:
    return "round_number" in inspect.signature(find_generator(run.workload.kind)).parameters


def _with_real_names(work: Workload, run: RunConfig) -> Workload:
    """Gives the log's adapters the directories of the same names. Raises ConfigError if a directory is missing."""
    assert work.names is not None
    names = [directory.name for directory in run.adapters.directories]
    for number in set(work.adapter.tolist()) - {BASE}:
        if work.names[number] not in names:
            raise ConfigError(
                f"workload: the log names adapter {work.names[number]!r}; {run.adapters.path} has {names[:20]}"
            )
    adapter = [BASE if number == BASE else names.index(work.names[number]) for number in work.adapter.tolist()]
    return replace(work, adapter=np.array(adapter), ranks=run.adapters.ranks[: len(names)], names=tuple(names))
