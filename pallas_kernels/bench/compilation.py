"""Compiles the benchmark's programs: for this machine, several at once, or for a GPU that is not present."""

from __future__ import annotations

import os
import time
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from typing import Any

from pallas_kernels.bench.case import Program, declined, error_text
from pallas_kernels.devices import Device, compiling_for
from pallas_kernels.targets import TARGETS, compile_for


@dataclass(frozen=True)
class Compiled:
    """result: the executable or the exception. seconds: of tracing and compiling."""

    program: Program
    result: Any
    seconds: float

    def facts(self) -> dict[str, Any]:
        """The program's entry in the results."""
        facts: dict[str, Any] = {"name": self.program.name, "seconds": round(self.seconds, 3)}
        if isinstance(self.result, Exception):
            return facts | {"skipped" if declined(self.result) else "failed": error_text(self.result)}
        return facts | {"temp_bytes": self.result.memory_analysis().temp_size_in_bytes}


def compile_program(program: Program, device: Device | None = None) -> Compiled:
    """Compiles for this machine, or for `device`, which need not be present."""
    start = time.perf_counter()
    result: Any
    try:
        if device is None:
            result = program.function.lower(*program.shapes()).compile()
        else:
            with compiling_for(device):
                shapes = program.shapes()
            result = compile_for(TARGETS[device.name], program.function, *shapes)
    except Exception as error:  # noqa: BLE001 - reported with every case of the program
        result = error
    return Compiled(program, result, time.perf_counter() - start)


def compile_all(programs: Iterable[Program], timeout: float) -> Iterator[Compiled]:
    """Compiles one program per core at once (32 at most) and yields each as it is ready. A program that is not ready
    within `timeout` seconds has a TimeoutError; its thread goes on."""
    executor = ThreadPoolExecutor(min(32, len(os.sched_getaffinity(0))))
    futures = {executor.submit(compile_program, program): program for program in programs}
    try:
        for future in as_completed(futures, timeout=max(0.0, timeout)):
            yield future.result()
            del futures[future]
    except TimeoutError:
        for program in futures.values():
            yield Compiled(program, TimeoutError(f"not compiled within {timeout:.0f} s"), timeout)
    finally:
        executor.shutdown(wait=False, cancel_futures=True)
