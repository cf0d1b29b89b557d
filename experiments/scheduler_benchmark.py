"""Host time of planning one step: `python -m experiments.scheduler_benchmark [--output FILE]`.

A steady state of R running and W waiting requests over 100 adapters: each step, some running requests end, as many new
ones arrive, and requests of the queue take the free slots while their adapters are prefetched. Timed: CPU time of the
thread (as `EngineStats.host_seconds`) in `Scheduler.schedule` alone, and in the whole turn with arrivals and ends. Also
at twice the size, as the cost should grow no faster than the queues. With the prefix cache, all prompts of an adapter
begin with the same 128 tokens, and the pool is full of idle prefixes, so that every new page evicts one.
"""

from __future__ import annotations

import argparse
import gc
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from experiments.machine import provenance, write_json
from slora_jax.memory import AdapterResidency, Evictor, Lru, PageAllocator, PageKind, PrefixCache
from slora_jax.scheduling import (
    AdapterState,
    AdapterUse,
    Ageing,
    Clustering,
    CoreConfig,
    EarlyAbort,
    Fcfs,
    FinishReason,
    Lcfs,
    Policy,
    Request,
    RequestMetrics,
    SamplingParams,
    Scheduler,
    Vtc,
)

RUNNING, WAITING, ADAPTERS, CHURN = 1_000, 10_000, 100, 4  # CHURN: requests that end, and arrive, per step
STEP_SECONDS = 0.03  # of the clock that the policies see
DEFAULT_OUTPUT = Path(__file__).parent / "results" / "scheduler_benchmark.json"

CASES: dict[str, tuple[Callable[[], Policy], str]] = {
    "fcfs": (Fcfs, "optimistic"),
    "lcfs": (Lcfs, "optimistic"),
    "early_abort, paper": (lambda: EarlyAbort(slo=1e6), "optimistic"),
    "early_abort, code": (lambda: EarlyAbort(slo=1e6, rule="code"), "optimistic"),
    "clustering, soft": (lambda: Clustering(ADAPTERS // 4), "optimistic"),
    "clustering, hard": (lambda: Clustering(ADAPTERS // 4, hard=True), "optimistic"),
    "vtc": (Vtc, "optimistic"),
    "ageing of fcfs, young": (lambda: Ageing(Fcfs(), bound=1e6), "optimistic"),
    "ageing of lcfs, aged": (lambda: Ageing(Lcfs(), bound=1.0), "optimistic"),
    "fcfs, reserve": (Fcfs, "reserve"),
    "fcfs, prefix cache": (Fcfs, "optimistic"),
    "fcfs, reserve, prefix cache": (Fcfs, "reserve"),
}


class InstantCopies:
    """Copies that are instant: every adapter is in host memory, and on the device as soon as its copy begins."""

    pages_in_flight = 0

    def adapter_state(self, digest: str) -> AdapterState:
        return AdapterState.READY


class Load:
    """A scheduler in the steady state, on page arithmetic alone."""

    def __init__(self, policy: Policy, admission: str, prefix_cache: bool, scale: int, seed: int = 0) -> None:
        self.rng = np.random.default_rng(seed)
        self.churn = CHURN * scale
        self.now = 0.0
        running, waiting = RUNNING * scale, WAITING * scale
        evictor = Evictor(PageAllocator(running * (48 if prefix_cache else 80)), Lru())
        residency = AdapterResidency(evictor, 2 * ADAPTERS)
        config = CoreConfig(max_num_seqs=running, max_num_batched_tokens=64 * running, admission=admission)
        prefixes = PrefixCache(evictor, 16) if prefix_cache else None
        self.scheduler = Scheduler(residency, policy, config, InstantCopies(), prefixes)
        self.instructions = self.rng.integers(1, 30_000, (ADAPTERS, 128)).tolist()
        self.arrivals = 0
        self.uses = [AdapterUse(f"a{i}", f"a{i}", np.full(7, 8, np.int32), 16) for i in range(ADAPTERS)]
        for _ in range(running):
            self.arrive(ADAPTERS // 4)
        while len(self.scheduler.running) < running:
            self.plan()
        for _ in range(waiting):
            self.arrive()
        while prefix_cache and evictor.allocator.available(PageKind.KV) > running:
            self.turn()

    def arrive(self, adapters: int = ADAPTERS) -> None:
        """Adds a request for one of the first `adapters` adapters."""
        prompt, new = self.rng.integers(8, 512, 2).tolist()
        number, self.arrivals = self.arrivals, self.arrivals + 1
        metrics = RequestMetrics(arrival=self.now)
        adapter = int(self.rng.integers(adapters))
        use, tokens = self.uses[adapter], [0] * prompt
        if self.scheduler.prefixes is not None:
            tokens = (self.instructions[adapter] + self.rng.integers(1, 30_000, prompt).tolist())[:prompt]
        self.scheduler.add(
            Request(str(number), number, tokens, SamplingParams(), 0, max_new=new + 512, adapter=use, metrics=metrics)
        )

    def plan(self) -> float:
        """Plans a step and gives its requests their tokens. Returns the seconds of `schedule`."""
        self.now += STEP_SECONDS
        start = time.thread_time()
        plan = self.scheduler.schedule(self.now)
        seconds = time.thread_time() - start
        for upload in plan.uploads:
            self.scheduler.residency.landed(upload)
        for sequence in plan.sequences:
            if sequence.samples:
                sequence.request.output.append(0)
        return seconds

    def turn(self) -> tuple[float, float]:
        """Ends some requests, adds as many, and plans a step. Returns the seconds of planning, and of all of it."""
        ended = [r for r in self.scheduler.running if len(r.output) >= r.max_new]
        others = [r for r in self.scheduler.running if len(r.output) < r.max_new]
        ended += [others[i] for i in self.rng.choice(len(others), max(0, self.churn - len(ended)), replace=False)]
        start = time.thread_time()
        for request in ended:
            self.scheduler.finish(request, FinishReason.STOP, self.now)
        finishing = time.thread_time() - start
        start = time.thread_time()
        while len(self.scheduler.waiting) < WAITING * self.churn // CHURN + len(ended):
            self.arrive()
        arriving = time.thread_time() - start
        planning = self.plan()
        return planning, finishing + arriving + planning


def measure(make: Callable[[], Policy], admission: str, prefix_cache: bool, turns: int) -> dict[str, Any]:
    """Returns milliseconds of planning over `turns` steps at the goal's size and at twice that, and the median of their
    ratio. Steps of the two alternate, so that a busy machine slows both and neither finds its own data in the
    caches."""
    loads = {f"{scale}x": Load(make(), admission, prefix_cache, scale) for scale in (1, 2)}
    gc.collect()
    rounds = [[load.turn() for load in loads.values()] for _ in range(10 + turns)][10:]
    times = {size: 1e3 * np.array([r[i] for r in rounds]) for i, size in enumerate(loads)}
    result: dict[str, Any] = {
        size: {
            "schedule_ms": round(float(np.median(t[:, 0])), 3),
            "schedule_p10_ms": round(float(np.percentile(t[:, 0], 10)), 3),
            "schedule_p95_ms": round(float(np.percentile(t[:, 0], 95)), 3),
            "turn_ms": round(float(np.median(t[:, 1])), 3),
        }
        for size, t in times.items()
    }
    return result | {"ratio_at_twice_the_size": round(float(np.median(times["2x"][:, 0] / times["1x"][:, 0])), 2)}


def benchmark(turns: int) -> dict[str, Any]:
    """Measures every case."""
    cases = {}
    for name, (make, admission) in CASES.items():
        cases[name] = measure(make, admission, "prefix cache" in name, turns)
        one, ratio = cases[name]["1x"], cases[name]["ratio_at_twice_the_size"]
        print(
            f"{name:28}{one['schedule_ms']:7.3f} ms (p10 {one['schedule_p10_ms']:.3f}, "
            f"p95 {one['schedule_p95_ms']:.3f}), "
            f"with arrivals and ends {one['turn_ms']:.3f} ms; at twice the size x{ratio:.2f}",
            flush=True,
        )
    return {
        "command": "python -m experiments.scheduler_benchmark",
        "unit": "milliseconds of CPU time of the planning thread, over steps",
        "running": RUNNING,
        "waiting": WAITING,
        "adapters": ADAPTERS,
        "ends_and_arrivals_per_step": CHURN,
        "turns": turns,
        "cases": cases,
        "provenance": provenance(("numpy",)),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--turns", type=int, default=100, help="steps measured per case")
    parser.add_argument("--output", type=Path, default=DEFAULT_OUTPUT)
    args = parser.parse_args()
    write_json(args.output, benchmark(args.turns))


if __name__ == "__main__":
    main()
