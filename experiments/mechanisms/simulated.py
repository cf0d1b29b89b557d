"""The comparisons in the simulator: runs of the paper, on its devices, with this engine's scheduling."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from typing import Any

from tqdm import tqdm

from experiments.mechanisms.scale import Scale
from experiments.paper.settings import SETTINGS
from experiments.workloads import simulated_requests, synthetic
from slora_jax.metrics import serving_metrics
from slora_jax.models import ModelConfig
from slora_jax.simulation import ModelShape, SimulationResult, SystemConfig, load_device, make_system, simulate

DISK_SHARE = 0.1
"""Of the adapters' bytes that host memory holds, where most adapters are to be on disk."""


@dataclass(frozen=True)
class Case:
    """A synthetic run of the paper. rate: requests per second. num_tokens: of the whole pool."""

    device: str
    setting: str
    num_adapters: int
    rate: float
    num_tokens: int

    @property
    def name(self) -> str:
        return f"{self.device} {self.setting} n={self.num_adapters} R={self.rate:g}"


CASES = (Case("a10g", "S2", 200, 2.0, 14_500), Case("a100-80", "S4", 400, 6.0, 65_000))


def simulated(scale: Scale) -> dict[str, Any]:
    """By comparison, case and system: figures of the run, and those over the first system's."""
    results: dict[str, Any] = {}
    for case in CASES:
        work = synthetic(
            num_adapters=case.num_adapters,
            ranks=SETTINGS[case.setting].ranks,
            rate=case.rate,
            duration=scale.simulated_seconds,
        )
        load = simulated_requests(work)
        config = ModelConfig.from_dict(json.loads(SETTINGS[case.setting].model_file.read_text()))
        shape = ModelShape.of(config)
        host_adapter_bytes = int(DISK_SHARE * sum(work.ranks) * shape.lora_bytes)
        for comparison, systems in _systems(case, scale, host_adapter_bytes).items():
            figures = {
                name: _figures(simulate(load, system, shape, load_device(case.device), work.ranks))
                for name, system in tqdm(systems.items(), desc=f"{case.name}: {comparison}", unit="run")
            }
            first = next(iter(figures.values()))
            over = {name: {k: own[k] / first[k] for k in own if first[k]} for name, own in figures.items()}
            results.setdefault(comparison, {})[case.name] = {"figures": figures, "over_the_first": over}
    return results


def _systems(case: Case, scale: Scale, host_adapter_bytes: int) -> dict[str, dict[str, SystemConfig]]:
    """By comparison and name; the memory of all is the same."""
    total = case.num_tokens
    slora = make_system(
        "slora",
        num_tokens=total,
        max_num_seqs=512,
        max_num_batched_tokens=2048,
        prefix_cache=False,
        host_adapter_bytes=None,
    )
    ahead = {
        comparison: {f"prefetch {n}": replace(slora, prefetch=n, host_adapter_bytes=held) for n in (8, 0)}
        for comparison, held in (("prefetch", None), ("prefetch, most adapters on disk", host_adapter_bytes))
    }
    memory = {"unified": slora}
    for share in scale.splits:
        adapters = int(share * total)
        split = replace(slora, num_tokens=total - adapters, adapter_tokens=adapters)
        memory[f"{100 * share:.0f}% for adapters"] = split
    return {**ahead, "memory": memory}


def _figures(result: SimulationResult) -> dict[str, float]:
    """Seconds on the virtual clock, requests per second, and counts."""
    metrics = serving_metrics(result.records, start=0.0)
    counters = result.counters
    return {
        "requests_per_second": metrics.throughput,
        "first_token_mean": metrics.first_token_latency.mean,
        "first_token_p50": metrics.first_token_latency.p50,
        "first_token_p99": metrics.first_token_latency.p99,
        "inter_token_p50": metrics.inter_token_latency.p50,
        "inter_token_p99": metrics.inter_token_latency.p99,
        "inter_token_max": metrics.inter_token_latency.maximum,
        "latency_mean": metrics.latency.mean,
        "queue_mean": metrics.queue_time.mean,
        "attainment": metrics.attainment,
        "most_running": max(sample.running for sample in result.pool),
        "preemptions": counters.preemptions,
        "adapter_loads": counters.adapter_loads,
        "adapter_hits": counters.adapter_hits,
        "disk_reads": counters.disk_reads,
        "copy_seconds": counters.copy_seconds,
        "stall_seconds": counters.stall_seconds,
    }
