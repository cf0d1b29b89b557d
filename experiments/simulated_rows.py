"""Simulates published runs: a row of the paper's results to a system, a workload, and our figures for it."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import cache
from multiprocessing import get_context

from experiments.paper.arguments import row_arguments
from experiments.paper.results import PaperRow
from experiments.paper.settings import SETTINGS
from experiments.workloads import Workload, arena_like, simulated_requests, synthetic
from slora_jax.metrics import serving_metrics
from slora_jax.models import ModelConfig
from slora_jax.scheduling import Clustering, EarlyAbort, Lcfs, Policy
from slora_jax.simulation import (
    DeviceModel,
    ModelShape,
    SystemConfig,
    load_device,
    make_system,
    simulate,
)

SYSTEM_NAMES = {
    "slora": "slora-paper",
    "lcfs": "slora-paper",
    "abort": "slora-paper",
    "clustering": "slora-paper",
    "no-unify-mem": "no-unify-mem-paper",
    "bmm": "bmm-paper",
    "merge": "merge-paper",
    "peft": "peft-paper",
}
"""System of a row -> name of the simulator's system."""

VLLM_MAX_SEQS, VLLM_MAX_TOKENS = 256, 2560
"""vLLM's defaults at the time (0.2), which its committed commands did not change."""


@dataclass(frozen=True)
class SimulatedRow:
    """Our figures for a published row, with the names of `PaperRow`. simulated_seconds: on the virtual clock."""

    throughput: float
    latency: float
    first_token_latency: float
    attainment: float
    satisfaction: float
    aborts: int
    simulated_seconds: float


def simulate_row(row: PaperRow, device: DeviceModel | None = None) -> SimulatedRow:
    """Simulates a row's run, on its device as its file has it or on the one given.

    Raises:
      ConfigError: the run does not fit into the device's memory.
    """
    device = load_device(row.device) if device is None else device
    work = row_workload(row)
    result = simulate(
        simulated_requests(work), row_system(row), row_model(row), device, work.ranks, policy=row_policy(row)
    )
    metrics = serving_metrics(result.records, start=0.0)
    latency, first = metrics.latency.mean, metrics.first_token_latency.mean
    return SimulatedRow(
        throughput=metrics.throughput,
        latency=latency,
        first_token_latency=latency if row.system == "vllm-packed" else first,  # its client received whole answers
        attainment=metrics.attainment,
        satisfaction=metrics.satisfaction,
        aborts=metrics.aborted,
        simulated_seconds=result.seconds,
    )


def simulate_rows(
    rows: Sequence[PaperRow], devices: Mapping[str, DeviceModel] | None = None, workers: int = 1
) -> list[SimulatedRow]:
    """Simulates rows, in order. Rows of the same run (`PaperRow.label`) are simulated once.

    Args:
      devices: by name, in place of the files.
      workers: processes.
    """
    first = {row.label: row for row in rows}
    chosen = [None if devices is None else devices[row.device] for row in first.values()]
    if workers == 1:
        results = list(map(simulate_row, first.values(), chosen))
    else:
        with ProcessPoolExecutor(workers, get_context("spawn")) as pool:
            results = list(pool.map(simulate_row, first.values(), chosen, chunksize=4))
    by_label = dict(zip(first, results, strict=True))
    return [by_label[row.label] for row in rows]


def row_workload(row: PaperRow) -> Workload:
    """Returns the requests of a row's run; a stand-in if the workload was real."""
    ranks = SETTINGS[row.setting].ranks
    if row.workload == "real":
        return arena_like(ranks=ranks, rate=row.rate, duration=row.duration)
    assert row.num_adapters is not None and row.alpha is not None and row.cv is not None
    return synthetic(
        num_adapters=row.num_adapters,
        ranks=ranks,
        rate=row.rate,
        duration=row.duration,
        alpha=row.alpha,
        cv=row.cv,
        input_range=row.input_range,
        output_range=row.output_range,
    )


@cache
def _shape(setting: str) -> ModelShape:
    config = ModelConfig.from_dict(json.loads(SETTINGS[setting].model_file.read_text()))
    return ModelShape.of(config)


def row_model(row: PaperRow) -> ModelShape:
    return _shape(row.setting)


def row_policy(row: PaperRow) -> Policy | None:
    """Returns the row's policy; None: the system's own."""
    if row.system == "lcfs":
        return Lcfs()
    if row.system == "abort":
        return EarlyAbort(rule="code")
    if row.system == "clustering":
        assert row.cluster is not None
        return Clustering(row.cluster)
    return None


def row_system(row: PaperRow) -> SystemConfig:
    """Returns the simulator's system for a row, with the row's arguments."""
    arguments = row_arguments(row)
    if row.system == "vllm-packed":
        assert arguments.replicas is not None and arguments.memory_share is not None
        return make_system(
            "packed",
            software="vllm",
            replicas=arguments.replicas,
            gpu_memory_utilization=arguments.memory_share * arguments.replicas,
            max_num_seqs=VLLM_MAX_SEQS,
            max_num_batched_tokens=VLLM_MAX_TOKENS,
            prefix_cache=False,
            mixed=False,
            overlap=False,
        )
    name = SYSTEM_NAMES[row.system]
    if row.system == "peft":
        return make_system(name, offline_batch=arguments.max_batch)
    return make_system(name, num_tokens=arguments.num_token)
