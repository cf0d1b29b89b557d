"""An engine under a workload, in real time."""

from __future__ import annotations

import time
from dataclasses import replace
from typing import Protocol

from experiments.systems.workload import Done, Run, Workload
from slora_jax import Delta, RequestOutput, SamplingParams
from slora_jax.simulation import Arrivals

LONGEST_NAP = 0.05
"""Seconds of sleep at once, so that Ctrl-C is heard."""


class Serving(Protocol):
    """What a system needs of an engine."""

    def add_request(
        self, prompt: list[int], params: SamplingParams, adapter: str | None = None, request_id: str | None = None
    ) -> str: ...

    def cancel(self, request_id: str) -> bool: ...

    def has_work(self) -> bool: ...

    def step(self) -> list[Delta]: ...


def serve(engine: Serving, workload: Workload, done: Done) -> Run:
    """Submits each request when its time has come and steps the engine until all are answered.

    Latencies count from the time at which a request was to arrive, even if a step was under way then; that of one that
    follows another counts from the other's last token (or its abort) on the engine's clock. An interruption
    (Ctrl-C) cancels what is unfinished, leaves the engine idle, and is raised.
    """
    start = time.perf_counter()
    arrivals = Arrivals(workload)
    outputs: dict[int, RequestOutput] = {}
    arrived: dict[int, float] = {}
    try:
        while arrivals or engine.has_work():
            now = time.perf_counter() - start
            for number, arrival in arrivals.until(now):
                arrived[number], request = arrival, workload[number]
                params = SamplingParams(max_tokens=request.output, ignore_eos=True)
                engine.add_request(list(request.prompt), params, request.adapter, f"{number}")
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
    except BaseException:
        for number in range(len(workload)):
            engine.cancel(f"{number}")
        while engine.has_work():
            engine.step()
        raise
    numbers = range(len(workload))
    records = [replace(outputs[number].record(), arrival=start + arrived[number]) for number in numbers]
    return Run(records, [outputs[number].token_ids for number in numbers])
