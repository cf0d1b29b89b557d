"""Compilation of every step program before the first request."""

from __future__ import annotations

import time
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
from tqdm import tqdm

from slora_jax.engine.batch import BatchLayout, Bucket
from slora_jax.engine.step import StepSpec, make_step, step_shapes


@dataclass(frozen=True)
class StepProgram:
    """One compiled step: callable with the arguments of `make_step`'s function."""

    layout: BatchLayout
    with_lora: bool
    compiled: Any
    compile_seconds: float

    def __call__(self, *args: Any) -> Any:
        return self.compiled(*args)


class StepPrograms:
    """The compiled steps of an engine, by bucket, with and without LoRA."""

    def __init__(self, spec: StepSpec, buckets: tuple[Bucket, ...], *, threads: int = 2, progress: bool = True) -> None:
        """Compiles all; `threads` at once. Raises what the compiler raises."""
        self.buckets = buckets
        layouts = [spec.layout(bucket) for bucket in buckets]
        jobs = [(layout, with_lora) for layout in reversed(layouts) for with_lora in (True, False)]
        self._programs: dict[tuple[Bucket, bool], StepProgram] = {}
        bar = tqdm(total=len(jobs), desc="compiling steps", unit="program", disable=not progress, leave=False)
        with bar, ThreadPoolExecutor(threads) as executor:
            futures = [executor.submit(_compile, spec, layout, with_lora) for layout, with_lora in jobs]
            for future in as_completed(futures):
                program = future.result()
                self._programs[program.layout.bucket, program.with_lora] = program
                bar.update()

    def select(self, tokens: int, seqs: int, with_lora: bool) -> StepProgram:
        """The program of the smallest bucket that holds `tokens` rows of `seqs` sequences, of the right kind."""
        decode = tokens == seqs
        bucket = next(b for b in self.buckets if b.decode == decode and b.tokens >= tokens and b.seqs >= seqs)
        return self._programs[bucket, with_lora]

    @property
    def programs(self) -> list[StepProgram]:
        return [self._programs[key] for key in sorted(self._programs)]


def _compile(spec: StepSpec, layout: BatchLayout, with_lora: bool) -> StepProgram:
    start = time.perf_counter()
    compiled = make_step(spec, layout, with_lora).lower(*step_shapes(spec, layout)).compile()
    return StepProgram(layout, with_lora, compiled, time.perf_counter() - start)


def keep_compiled_programs(directory: str | Path | None) -> None:
    """Turns on JAX's persistent compilation cache in `directory`, unless JAX is configured with one already."""
    if directory is None or jax.config.jax_compilation_cache_dir:
        return
    path = Path(directory).expanduser()
    path.mkdir(mode=0o700, parents=True, exist_ok=True)
    jax.config.update("jax_compilation_cache_dir", str(path))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
