"""Compilation of the step programs."""

from __future__ import annotations

import atexit
import ctypes
import itertools
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextvars import copy_context
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from queue import SimpleQueue
from typing import Any

import jax
from tqdm import tqdm

from pallas_kernels.lora.bmm import smallest
from slora_jax.engine.after_step import AFTER_STEP, after_step_name
from slora_jax.engine.batch import BatchLayout, Bucket
from slora_jax.engine.layered import LayeredStep, Part
from slora_jax.engine.program_cache import ProgramCache
from slora_jax.engine.step import make_step, step_name, step_shapes
from slora_jax.engine.step_spec import Lora, StepSpec
from slora_jax.phases import advance, phase

StepKey = tuple[int, int]
"""Identifies a step program: index of its bucket, and index of its LoRA work in the bucket's `lora_programs`."""


@dataclass(frozen=True)
class Program:
    """One compiled program, callable with its function's arguments. `is_cached` if it was loaded from disk."""

    name: str
    compiled: Any
    compile_seconds: float
    is_cached: bool = False

    def __call__(self, *args: Any) -> Any:
        return self.compiled(*args)


class StepPrograms:
    """The compiled steps of an engine by bucket and LoRA work, and the programs after them by number of sequences."""

    def __init__(
        self,
        spec: StepSpec,
        buckets: tuple[Bucket, ...],
        *,
        ahead: bool = True,
        threads: int = 2,
        progress: bool = True,
        cache_dir: Path | None = None,
    ) -> None:
        """Compiles all programs, or loads those compiled by earlier starts. Raises the compiler's errors.

        Args:
          ahead: False compiles each program at its first use.
          threads: number of programs compiled at the same time.
          progress: whether to show a progress bar.
          cache_dir: directory of compiled programs, used on a CPU only; None disables it.
        """
        self.buckets = buckets
        self.layouts = {bucket: spec.layout(bucket) for bucket in buckets}
        self._threads, self._progress = threads, progress
        self._lora = {bucket: spec.lora_programs(layout) for bucket, layout in self.layouts.items()}
        keys = [(bucket, lora) for bucket in buckets for lora in self._lora[bucket]]
        self._layered = {key: LayeredStep(spec, self.layouts[key[0]], key[1]) for key in keys if spec.layered}
        self._parts: dict[str, tuple[Part, str]] = {}
        for bucket, lora in reversed(keys):
            layout, layered = self.layouts[bucket], self._layered.get((bucket, lora))
            for part in [_whole_step(spec, layout, lora)] if layered is None else layered.parts:
                self._parts[part.name] = part, repr((layout, lora))
        for seqs, kind in itertools.product({bucket.seqs for bucket in buckets}, AFTER_STEP):
            part = _after_step(spec, kind, seqs)
            self._parts[part.name] = part, ""
        self._cache: ProgramCache | None = None
        if cache_dir is not None and spec.layered and spec.parallel is None:
            self._cache = ProgramCache(cache_dir, spec)
        self._programs: dict[str, Program] = {}
        self._steps: dict[tuple[Bucket, Lora], Callable[..., Any]] = {}
        if ahead:
            self._get(self._parts)
            for key in keys:
                self._step(*key)
            _return_memory()

    def select(
        self, tokens: int, seqs: int, with_lora: Lora, segments: Sequence[int] = (), pools: bool = False
    ) -> tuple[StepKey, BatchLayout]:
        """Returns the smallest program that can run a step, and the layout of its metadata.

        Args:
          tokens, seqs: number of tokens and sequences of the step.
          with_lora: whether a request has an adapter, or "extras" if one has an adapter with more than plain LoRA.
          segments: number of tokens of each adapter; only with `lora="bmm"`.
          pools: whether the step pools hidden states.
        """
        kind = tokens == seqs and not pools, pools
        number, bucket = next(
            (i, b)
            for i, b in enumerate(self.buckets)
            if (b.decode, b.pools) == kind and b.tokens >= tokens and b.seqs >= seqs
        )
        lora = self._lora[bucket]
        with_padding = smallest(lora[1:], segments) if segments else with_lora  # type: ignore[arg-type]
        return (number, lora.index(with_padding)), self.layouts[bucket]

    def bucket(self, key: StepKey) -> Bucket:
        return self.buckets[key[0]]

    def step(self, key: StepKey) -> Callable[..., Any]:
        """Returns a program that takes the arguments of `make_step`'s function."""
        bucket = self.bucket(key)
        return self._step(bucket, self._lora[bucket][key[1]])

    def after_step(self, kind: str, seqs: int) -> Program:
        """Returns a program of `AFTER_STEP` for a bucket of `seqs` sequences."""
        return self._get([after_step_name(kind, seqs)])[0]

    @property
    def programs(self) -> list[Program]:
        return list(self._programs.values())

    def _step(self, bucket: Bucket, lora: Lora) -> Callable[..., Any]:
        step = self._steps.get((bucket, lora))
        if step is None:
            layered = self._layered.get((bucket, lora))
            if layered is None:
                step = self._get([step_name(bucket, lora)])[0]
            else:
                self._get([part.name for part in layered.parts])
                step = layered.program(self._programs)
            self._steps[bucket, lora] = step
        return step

    def _get(self, names: Collection[str]) -> list[Program]:
        """Returns programs by name, compiling those that are missing."""
        missing = [name for name in names if name not in self._programs]
        if missing:
            jobs = {name: partial(_compile, *self._parts[name], self._cache) for name in missing}
            bar = tqdm(total=len(jobs), desc="compiling steps", unit="program", disable=not self._progress, leave=False)
            with phase("programs"), bar:
                advance(0, len(jobs))
                for done, (name, program) in enumerate(on_threads(jobs, self._threads), 1):
                    self._programs[name] = program
                    bar.update()
                    advance(done, len(jobs))
        return [self._programs[name] for name in names]


def _whole_step(spec: StepSpec, layout: BatchLayout, lora: Lora) -> Part:
    return Part(step_name(layout.bucket, lora), make_step(spec, layout, lora), lambda: step_shapes(spec, layout))


def _after_step(spec: StepSpec, kind: str, seqs: int) -> Part:
    make, shapes = AFTER_STEP[kind]
    return Part(after_step_name(kind, seqs), make(spec, seqs), lambda: shapes(spec, seqs))


def _compile(part: Part, about: str, cache: ProgramCache | None) -> Program:
    start = time.perf_counter()
    compiled = None if cache is None else cache.load(part.name, about)
    is_cached = compiled is not None
    if compiled is None:
        lowered = part.function.lower(*part.shapes())
        compiled = lowered.compile() if cache is None else cache.compile(part.name, about, lowered)
    return Program(part.name, compiled, time.perf_counter() - start, is_cached)


def _return_memory() -> None:
    """Returns heap memory freed by the compiler to the system: hundreds of megabytes with glibc's allocator."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform == "linux" else None
    if trim is not None:
        trim(0)


# Threads

GRACE_SECONDS = 2.0
"""Time that an exiting process waits for running compilations, which cannot be interrupted."""

_running: set[threading.Thread] = set()


def on_threads(jobs: Mapping[str, Callable[[], Program]], threads: int) -> Iterator[tuple[str, Program]]:
    """Runs the jobs on `threads` threads and yields each name and result as it finishes.

    On an exception, including Ctrl-C, it raises at once; no further job starts, and running ones finish in the
    background, because XLA cannot be interrupted. Jobs run in a copy of the caller's context, which may select a device
    (`devices.compiling_for`).
    """
    waiting = iter(list(jobs.items()))
    results: SimpleQueue[tuple[str, Program | BaseException]] = SimpleQueue()
    stopped, lock = threading.Event(), threading.Lock()

    def work() -> None:
        try:
            while not stopped.is_set():
                with lock:
                    name, job = next(waiting, (None, None))
                if name is None or job is None:
                    return
                try:
                    results.put((name, job()))
                except BaseException as error:  # noqa: BLE001  raised again in the caller's thread
                    results.put((name, error))
        finally:
            _running.discard(threading.current_thread())

    try:
        for _ in range(min(threads, len(jobs))):
            thread = threading.Thread(target=copy_context().run, args=(work,), name="compile", daemon=True)
            _running.add(thread)
            thread.start()
        for _ in jobs:
            name, result = results.get()
            if isinstance(result, BaseException):
                raise result
            yield name, result
    finally:
        stopped.set()


@atexit.register
def _leave() -> None:
    """Ends the process without finalization if a thread is still inside XLA, which would crash during finalization."""
    if not _running:
        return
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # a second Ctrl-C must not interrupt the wait
    end = time.monotonic() + GRACE_SECONDS
    while _running and time.monotonic() < end:  # `join` would fail for a thread whose `start` was interrupted
        time.sleep(0.01)
    if _running:
        for stream in (sys.stdout, sys.stderr):
            stream.flush()
        os._exit(130)


def keep_compiled_programs(directory: str | Path | None) -> None:
    """Enables JAX's persistent compilation cache in `directory`, unless JAX already has one."""
    if directory is None or jax.config.jax_compilation_cache_dir:
        return
    path = Path(directory).expanduser()
    path.mkdir(mode=0o700, parents=True, exist_ok=True)
    jax.config.update("jax_compilation_cache_dir", str(path))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
