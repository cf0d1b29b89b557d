"""Runs in the simulator."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from experiments.config.schema import RunConfig
from experiments.runners.figures import run_figures
from experiments.runners.workload import run_workload
from experiments.workloads import simulated_requests
from slora_jax.scheduling import make_policy
from slora_jax.simulation import ModelShape, SystemConfig, load_device, make_system, simulate


def run_simulated(run: RunConfig) -> dict[str, Any]:
    """Returns the figures of a run; the same for the same config, to the last bit.

    Raises:
      SloraError: the run does not fit into the device's memory, or its settings do not fit together.
    """
    work = run_workload(run)
    system = make_system(run.system.name, **run.system.settings)
    shape = ModelShape.of(run.model_config(), lora_targets=run.adapters.targets)
    device = load_device(run.device)
    result = simulate(
        simulated_requests(work),
        system,
        shape,
        device,
        work.ranks,
        policy=None if run.system.policy is None else make_policy(**run.system.policy),
    )
    figures = run_figures(result.records, 0.0, run.slo_seconds, run.dollars_per_hour)
    if system.offline_batch is None:
        figures |= _pool_figures(system, shape, system.pool_tokens(shape, device), work.ranks)
    return figures | asdict(result.counters)


def _pool_figures(
    system: SystemConfig, shape: ModelShape, num_tokens: int, ranks: Sequence[int]
) -> dict[str, float | None]:
    """Returns the capacity of one replica's pool: `pool_tokens` of KV alone, or `pool_adapters` of these ranks alone
    (None: there are no adapters)."""
    shard = system.shard_of(shape)
    pages = [shard.adapter_pages(rank, system.page_size) for rank in ranks]
    held = num_tokens // system.page_size * len(pages) // sum(pages) if pages else None
    return {"pool_tokens": num_tokens, "pool_adapters": held}
