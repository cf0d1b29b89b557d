"""Compilation of every step program before the first request."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextvars import copy_context
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import jax
from tqdm import tqdm

from pallas_kernels.lora.bmm import smallest
from slora_jax.engine.batch import BatchLayout, Bucket
from slora_jax.engine.step import StepSpec, make_sampler, make_step, sampler_shapes, step_shapes

StepKey = tuple[int, int]
"""Names a step program: the number of its bucket, and of its LoRA work among the bucket's, the least first."""


@dataclass(frozen=True)
class Program:
    """One compiled program: callable with the arguments of `make_step`'s or `make_sampler`'s function."""

    name: str
    compiled: Any
    compile_seconds: float

    def __call__(self, *args: Any) -> Any:
        return self.compiled(*args)


class StepPrograms:
    """The compiled steps of an engine, by bucket and LoRA work; and its samplers, by number of sequences, with
    and without log-probabilities."""

    def __init__(self, spec: StepSpec, buckets: tuple[Bucket, ...], *, threads: int = 2, progress: bool = True) -> None:
        """Compiles all; `threads` at once. Raises what the compiler raises."""
        self.buckets = buckets
        self.layouts = {bucket: spec.layout(bucket) for bucket in buckets}
        jobs: dict[Any, Callable[[], Program]] = {}
        self._lora = {bucket: spec.lora_programs(layout) for bucket, layout in self.layouts.items()}
        for bucket in reversed(buckets):
            layout = self.layouts[bucket]
            for lora in reversed(self._lora[bucket]):
                jobs[bucket, lora] = partial(_compile, make_step(spec, layout, lora), *step_shapes(spec, layout))
        for seqs, logprobs in itertools.product({bucket.seqs for bucket in buckets}, (False, True)):
            jobs[seqs, logprobs] = partial(_compile, make_sampler(spec, seqs, logprobs), *sampler_shapes(spec, seqs))
        self._programs: dict[Any, Program] = {}
        bar = tqdm(total=len(jobs), desc="compiling steps", unit="program", disable=not progress, leave=False)
        with bar, ThreadPoolExecutor(threads) as executor:
            # Each job in a copy of this context: a device may be named in it (`devices.compiling_for`).
            futures = {executor.submit(copy_context().run, job): key for key, job in jobs.items()}
            for future in as_completed(futures):
                self._programs[futures[future]] = future.result()
                bar.update()

    def select(
        self, tokens: int, seqs: int, with_lora: bool, segments: Sequence[int] = ()
    ) -> tuple[StepKey, BatchLayout]:
        """The program of the smallest bucket that holds `tokens` rows of `seqs` sequences, of the right kind, and how
        its metadata lies in its buffer. segments: rows of each adapter, where programs differ by their padding."""
        decode = tokens == seqs
        number, bucket = next(
            (i, b) for i, b in enumerate(self.buckets) if b.decode == decode and b.tokens >= tokens and b.seqs >= seqs
        )
        lora = self._lora[bucket]
        with_padding = smallest(lora[1:], segments) if segments else with_lora  # type: ignore[arg-type]
        return (number, lora.index(with_padding)), self.layouts[bucket]

    def bucket(self, key: StepKey) -> Bucket:
        return self.buckets[key[0]]

    def step(self, key: StepKey) -> Program:
        bucket = self.bucket(key)
        return self._programs[bucket, self._lora[bucket][key[1]]]

    def sampler(self, seqs: int, logprobs: bool) -> Program:
        """The sampler for a bucket of `seqs` sequences."""
        return self._programs[seqs, logprobs]

    @property
    def programs(self) -> list[Program]:
        return list(self._programs.values())


def _compile(function: Any, *shapes: Any) -> Program:
    start = time.perf_counter()
    compiled = function.lower(*shapes).compile()
    return Program(function.__name__, compiled, time.perf_counter() - start)


def keep_compiled_programs(directory: str | Path | None) -> None:
    """Turns on JAX's persistent compilation cache in `directory`, unless JAX is configured with one already."""
    if directory is None or jax.config.jax_compilation_cache_dir:
        return
    path = Path(directory).expanduser()
    path.mkdir(mode=0o700, parents=True, exist_ok=True)
    jax.config.update("jax_compilation_cache_dir", str(path))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
