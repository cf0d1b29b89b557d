"""Host time of planning one step: `python -m experiments.scheduler_benchmark [--output FILE]`.

A steady state of R running and W waiting requests over 100 adapters: each step, some running requests end, as many new
ones arrive, and the freed slots are filled from the queue. Timed: `Scheduler.schedule` alone, and the whole turn with
the arrivals and the ends. Also at twice the size, as the cost should grow no faster than the queues.
"""

from __future__ import annotations

import argparse
import gc
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from experiments.machine import provenance
from slora_jax.memory import AdapterResidency, PageAllocator
from slora_jax.scheduling import (
    AdapterUse,
    Ageing,
    Clustering,
    EarlyAbort,
    Fcfs,
    FinishReason,
    Lcfs,
    Policy,
    Request,
    RequestMetrics,
    SamplingParams,
    Scheduler,
    SchedulerLimits,
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
}


class Load:
    """A scheduler in the steady state, on page arithmetic alone."""

    def __init__(self, policy: Policy, admission: str, scale: int, seed: int = 0) -> None:
        self.rng = np.random.default_rng(seed)
        self.churn = CHURN * scale
        self.now = 0.0
        running, waiting = RUNNING * scale, WAITING * scale
        allocator = PageAllocator(running * 80)
        residency = AdapterResidency(allocator, 2 * ADAPTERS)
        limits = SchedulerLimits(running, 64 * running, page_size=16, admission=admission)
        self.scheduler = Scheduler(allocator, residency, policy, limits)
        self.arrivals = 0
        self.uses = [AdapterUse(f"a{i}", f"a{i}", np.full(7, 8, np.int32), 16) for i in range(ADAPTERS)]
        for _ in range(running):
            self.arrive(ADAPTERS // 4)
        while len(self.scheduler.running) < running:
            self.plan()
        for _ in range(waiting):
            self.arrive()

    def arrive(self, adapters: int = ADAPTERS) -> None:
        """A request for one of the first so many adapters."""
        prompt, new = self.rng.integers(8, 512, 2).tolist()
        number, self.arrivals = self.arrivals, self.arrivals + 1
        metrics = RequestMetrics(arrival=self.now)
        use = self.uses[int(self.rng.integers(adapters))]
        self.scheduler.add(
            Request(
                str(number), number, [0] * prompt, SamplingParams(), 0, max_new=new + 512, adapter=use, metrics=metrics
            )
        )

    def plan(self) -> float:
        """Plans a step and hands out its tokens; the seconds of `schedule`."""
        self.now += STEP_SECONDS
        start = time.thread_time()
        plan = self.scheduler.schedule(self.now)
        seconds = time.thread_time() - start
        for sequence in plan.sequences:
            if sequence.samples:
                sequence.request.output.append(0)
        return seconds

    def turn(self) -> tuple[float, float]:
        """Some end, as many arrive, a step is planned: the seconds of the planning, and of all that."""
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


def measure(policy: Policy, admission: str, scale: int, turns: int) -> dict[str, float]:
    """Milliseconds over `turns` steps: median and 95th percentile of planning, median of the whole turn."""
    load = Load(policy, admission, scale)
    for _ in range(10):
        load.turn()
    gc.collect()
    times = [load.turn() for _ in range(turns)]
    planning = [1e3 * seconds for seconds, _ in times]
    return {
        "schedule_ms": round(statistics.median(planning), 3),
        "schedule_p95_ms": round(float(np.percentile(planning, 95)), 3),
        "turn_ms": round(statistics.median(1e3 * seconds for _, seconds in times), 3),
    }


def benchmark(turns: int = 200) -> dict[str, Any]:
    """Every case at the size of the goal and at twice that."""
    cases = {}
    for name, (make, admission) in CASES.items():
        one, two = measure(make(), admission, 1, turns), measure(make(), admission, 2, turns)
        cases[name] = {"1x": one, "2x": two, "ratio": round(two["schedule_ms"] / one["schedule_ms"], 2)}
        print(
            f"{name:22} {one['schedule_ms']:7.3f} ms (p95 {one['schedule_p95_ms']:.3f}), with arrivals and ends "
            f"{one['turn_ms']:7.3f} ms; at twice the size x{cases[name]['ratio']:.2f}",
            flush=True,
        )
    return {
        "command": "python -m experiments.scheduler_benchmark",
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
    parser.add_argument("--turns", type=int, default=200, help="steps measured per case")
    parser.add_argument("--output", type=Path, default=DEFAULT_OUTPUT)
    args = parser.parse_args()
    results = benchmark(args.turns)
    args.output.write_text(json.dumps(results, indent=1) + "\n")
    print(f"wrote {args.output}")


if __name__ == "__main__":
    main()
