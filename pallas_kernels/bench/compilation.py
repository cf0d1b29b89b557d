"""Compiling the benchmark's programs: many at once on the machine, or one by one for a GPU that is not there."""

from __future__ import annotations

import os
import time
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from typing import Any

from pallas_kernels.bench.case import Program
from pallas_kernels.devices import Device, compiling_for
from pallas_kernels.targets import TARGETS, compile_for


@dataclass(frozen=True)
class Compiled:
    """result: the executable, or what was raised. seconds: of tracing and compiling."""

    program: Program
    result: Any
    seconds: float


def compile_here(programs: Iterable[Program], timeout: float) -> Iterator[Compiled]:
    """Compiles for this machine, as many at once as it has cores (32 at most), and yields them as they are ready.
    Those that are not after `timeout` seconds are given up."""
    executor = ThreadPoolExecutor(min(32, len(os.sched_getaffinity(0))))
    futures = {executor.submit(_compile, program): program for program in programs}
    try:
        for future in as_completed(futures, timeout=max(0.0, timeout)):
            yield future.result()
            del futures[future]
    except TimeoutError:
        for program in futures.values():
            yield Compiled(program, TimeoutError(f"not compiled within {timeout:.0f} s"), timeout)
    finally:
        executor.shutdown(wait=False, cancel_futures=True)


def compile_for_absent(programs: Iterable[Program], device: Device) -> Iterator[Compiled]:
    """Compiles for a GPU that is not there."""
    for program in programs:
        start = time.perf_counter()
        result: Any
        try:
            with compiling_for(device):
                shapes = program.shapes()
            result = compile_for(TARGETS[device.name], program.function, *shapes)
        except Exception as error:  # noqa: BLE001 - reported with the program
            result = error
        yield Compiled(program, result, time.perf_counter() - start)


def _compile(program: Program) -> Compiled:
    start = time.perf_counter()
    result: Any
    try:
        result = program.function.lower(*program.shapes()).compile()
    except Exception as error:  # noqa: BLE001 - reported with every case of the program
        result = error
    return Compiled(program, result, time.perf_counter() - start)


def declined(error: Exception) -> str:
    """Why a backend does not take part, if that is what `error` says: it does not serve the shape, or it is not
    installed. Else ""."""
    if isinstance(error, NotImplementedError | ModuleNotFoundError):
        return str(error)
    return ""
