"""An engine under a workload, in real time."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

from experiments.workloads.requests import WorkloadRequest
from slora_jax import Delta, RequestOutput, SamplingParams
from slora_jax.metrics import RequestRecord
from slora_jax.simulation import Arrivals

LONGEST_NAP = 0.05
"""Seconds of one sleep: a longer one would delay Ctrl-C."""


Done = Callable[[], object]
"""Called at the end of each request: the progress bar."""


@dataclass(frozen=True)
class Run:
    """The outcome of a workload.

    Attributes:
      records, tokens: of each request, in the workload's order.
      most_running: requests that ran at once, at most; None: unknown.
    """

    records: list[RequestRecord]
    tokens: list[list[int]]
    most_running: int | None = None


class Serving(Protocol):
    """The part of an engine that `serve` calls."""

    def add_request(
        self, prompt: list[int], params: SamplingParams, adapter: str | None = None, request_id: str | None = None
    ) -> str: ...

    def cancel(self, request_id: str) -> bool: ...

    def has_work(self) -> bool: ...

    def step(self) -> list[Delta]: ...


def serve(engine: Serving, workload: Sequence[WorkloadRequest], done: Done) -> Run:
    """Submits each request at its time and steps the engine until all requests have finished.

    Latencies count from a request's arrival time, even if a step was running then; those of a request that follows
    another count from the other's last token (or its abort) on the engine's clock. An interruption (Ctrl-C) cancels the
    unfinished requests, leaves the engine idle, and is raised again.
    """
    start = time.perf_counter()
    arrivals = Arrivals(workload)
    scheduler, most_running = getattr(engine, "scheduler", None), 0
    outputs: dict[int, RequestOutput] = {}
    arrived: dict[int, float] = {}
    try:
        while arrivals or engine.has_work():
            now = time.perf_counter() - start
            for number, arrival in arrivals.until(now):
                arrived[number], request = arrival, workload[number]
                engine.add_request(list(request.prompt), request.params(), request.adapter, f"{number}")
            if not engine.has_work():
                time.sleep(min(LONGEST_NAP, max(0.0, arrivals.next - now)))
                continue
            for delta in engine.step():
                if delta.output is not None:
                    number, finished = int(delta.request_id), delta.output.metrics.finished
                    assert finished is not None
                    outputs[number] = delta.output
                    arrivals.ended(number, finished - start)
                    done()
            if scheduler is not None:
                most_running = max(most_running, len(scheduler.running))
    except BaseException:
        for number in range(len(workload)):
            engine.cancel(f"{number}")
        while engine.has_work():
            engine.step()
        raise
    numbers = range(len(workload))
    records = [replace(outputs[number].record(), arrival=start + arrived[number]) for number in numbers]
    tokens = [outputs[number].token_ids for number in numbers]
    return Run(records, tokens, None if scheduler is None else most_running)
