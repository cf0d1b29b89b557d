"""Measures the speed of the simulation: `python -m slora_jax.simulation.benchmark`.

Simulates the paper's synthetic workload with S-LoRA's scheduling and with this engine's, and prints virtual seconds per
second of processor time. The goal is 200.
"""

from __future__ import annotations

import argparse
import time
from dataclasses import dataclass

import numpy as np

from slora_jax.metrics import serving_metrics
from slora_jax.simulation.device import load_device
from slora_jax.simulation.request import SimulatedRequest
from slora_jax.simulation.shape import ModelShape
from slora_jax.simulation.simulate import simulate
from slora_jax.simulation.system import make_system

LLAMA_7B = ModelShape(32, 4096, 4096, 4096, 11008, 32000)
LLAMA_13B = ModelShape(40, 5120, 5120, 5120, 13824, 32000)


@dataclass(frozen=True)
class Case:
    """One run of the paper's default synthetic workload: `rate` requests per second for `duration` seconds."""

    name: str
    device: str
    model: ModelShape
    ranks: tuple[int, ...]
    num_adapters: int
    rate: float
    num_tokens: int
    duration: float = 300.0

    def workload(self, seed: int = 42) -> list[SimulatedRequest]:
        """Poisson arrivals, adapters drawn uniformly, prompts and outputs of 8 to 511 tokens."""
        random = np.random.default_rng(seed)
        count = int(self.rate * self.duration)
        arrival = np.cumsum(random.exponential(1 / self.rate, count)).tolist()
        adapter = random.integers(0, self.num_adapters, count).tolist()
        lengths = random.integers(8, 512, (count, 2)).tolist()
        return [SimulatedRequest(t, a, *pair) for t, a, pair in zip(arrival, adapter, lengths, strict=True)]


CASES = (
    Case("A10G S2 n=200 R=2", "a10g", LLAMA_7B, (64, 32, 16, 8), 200, 2.0, 14_500),
    Case("A100-80 S4 n=400 R=6", "a100-80", LLAMA_13B, (64, 32, 16), 400, 6.0, 65_000),
    Case("A100-80 S2 n=200 R=10", "a100-80", LLAMA_7B, (64, 32, 16, 8), 200, 10.0, 125_000),
)


def main() -> None:
    """Prints one line for each case and system."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--step-by-step", action="store_true", help="do not fast-forward")
    args = parser.parse_args()
    for case in CASES:
        ranks = [case.ranks[i % len(case.ranks)] for i in range(case.num_adapters)]
        for name in ("slora-paper", "slora"):
            system = make_system(name, num_tokens=case.num_tokens)
            workload, device = case.workload(), load_device(case.device)
            start = time.process_time()
            result = simulate(workload, system, case.model, device, ranks, fast_forward=not args.step_by_step)
            seconds = time.process_time() - start
            speed, steps = result.seconds / seconds, result.counters.steps
            print(
                f"{case.name:22} {name:12} {result.seconds:5.0f} s in {seconds:5.2f} s: {speed:5.0f} x real time, "
                f"{1e6 * seconds / steps:4.0f} us a step of {1e3 * result.seconds / steps:4.0f} ms; "
                f"{serving_metrics(result.records, start=0.0).throughput:.2f} requests/s",
                flush=True,
            )


if __name__ == "__main__":
    main()
