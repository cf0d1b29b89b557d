"""Runs in the simulator."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from experiments.config.schema import RunConfig
from experiments.runners.figures import run_figures
from experiments.runners.workload import run_workload
from experiments.workloads import simulated_requests
from slora_jax.scheduling import make_policy
from slora_jax.simulation import ModelShape, load_device, make_system, simulate


def run_simulated(run: RunConfig) -> dict[str, Any]:
    """Returns the figures of a run; the same for the same config, to the last bit.

    Raises:
      SloraError: the run does not fit into the device's memory, or its settings do not fit together.
    """
    work = run_workload(run)
    result = simulate(
        simulated_requests(work),
        make_system(run.system.name, **run.system.settings),
        _shape(run),
        load_device(run.device),
        work.ranks,
        policy=None if run.system.policy is None else make_policy(**run.system.policy),
    )
    figures = run_figures(result.records, 0.0, run.slo_seconds, run.dollars_per_hour)
    return figures | asdict(result.counters)


def _shape(run: RunConfig) -> ModelShape:
    return ModelShape.of(run.model_config(), lora_targets=run.adapters.targets)
