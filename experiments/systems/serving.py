"""An engine under a workload, in real time."""

from __future__ import annotations

import time
from collections import deque
from dataclasses import replace
from typing import Protocol

from experiments.systems.workload import Done, Run, Workload
from slora_jax import Delta, RequestOutput, SamplingParams
from slora_jax.metrics import RequestRecord

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

    Latencies count from the time at which a request was to arrive, even if a step was under way then. An interruption
    (Ctrl-C) cancels what is unfinished, leaves the engine idle, and is raised.
    """
    start = time.perf_counter()
    to_come = deque(enumerate(workload))
    outputs: dict[int, RequestOutput] = {}
    try:
        while to_come or engine.has_work():
            now = time.perf_counter() - start
            while to_come and to_come[0][1].arrival <= now:
                number, request = to_come.popleft()
                params = SamplingParams(max_tokens=request.output, ignore_eos=True)
                engine.add_request(list(request.prompt), params, request.adapter, f"{number}")
            if not engine.has_work():
                time.sleep(min(LONGEST_NAP, max(0.0, to_come[0][1].arrival - now)))
                continue
            for delta in engine.step():
                if delta.output is not None:
                    outputs[int(delta.request_id)] = delta.output
                    done()
    except BaseException:
        for number in range(len(workload)):
            engine.cancel(f"{number}")
        while engine.has_work():
            engine.step()
        raise
    ordered = [outputs[number] for number in range(len(workload))]
    records = [
        replace(RequestRecord.of(output), arrival=start + request.arrival)
        for output, request in zip(ordered, workload, strict=True)
    ]
    return Run(records, [output.token_ids for output in ordered])
