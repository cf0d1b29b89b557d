"""The compile report: an engine's step programs compiled for an absent GPU, with their memory and kernels."""

from __future__ import annotations

import dataclasses
import importlib.util
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np
from tqdm import tqdm

from pallas_kernels.devices import compiling_for
from pallas_kernels.lora.layout import PROJECTIONS, ceil_div
from pallas_kernels.targets import Target, compile_for, deviceless_mesh
from slora_jax.analysis.collectives import Collective, collectives_in
from slora_jax.analysis.compiled import pool_use
from slora_jax.analysis.hlo import launches
from slora_jax.analysis.kernels import KernelUse, kernels_in
from slora_jax.analysis.ptxas import ptxas
from slora_jax.engine import EngineConfig
from slora_jax.engine.after_step import AFTER_STEP, after_step_name
from slora_jax.engine.config import Bucket
from slora_jax.engine.sizing import longest_sequence, pool_shape, step_spec
from slora_jax.engine.step import make_step, step_shapes
from slora_jax.engine.step_spec import StepSpec
from slora_jax.errors import ConfigError
from slora_jax.models import ModelConfig, Params, abstract_decoder
from slora_jax.models.init import abstract_shards
from slora_jax.models.quantised import num_bytes
from slora_jax.parallel.mesh import TensorParallel, cut

SIZING_LAYERS = 2
"""Layers of the program that sizes the pool. More layers need hardly more temporaries: at most..."""
SIZING_MARGIN = (1.05, 2**20)
"""...this factor, plus this many bytes."""


@dataclass(frozen=True)
class ProgramReport:
    """One program, a step or a sampler. All bytes are per device.

    Attributes:
      tokens, seqs: its bucket.
      argument_bytes: weights, pool and other arguments.
      temp_bytes: temporaries.
      output_bytes: results with their own memory (a step's logits).
      aliased_bytes: arguments updated in place.
      pool_bytes: the pool; 0 for a sampler.
      launches: kernels, copies and library calls of one run, those of the kernels below included.
      copies: HLO lines that copy a layer's pool.
    """

    name: str
    tokens: int
    seqs: int
    with_lora: bool
    compile_seconds: float
    argument_bytes: int
    temp_bytes: int
    output_bytes: int
    aliased_bytes: int
    pool_bytes: int
    launches: int
    copies: tuple[str, ...]
    kernels: tuple[KernelUse, ...]
    collectives: tuple[Collective, ...]

    @property
    def is_sampler(self) -> bool:
        return self.pool_bytes == 0

    def problems(self) -> list[str]:
        """Defects: spills, and a pool that is not updated in place."""
        found = [
            f"{self.name}: kernel {kernel.name} ({kernel.backend}) spills {kernel.spill_bytes} bytes a thread"
            for kernel in self.kernels
            if kernel.spill_bytes
        ]
        found += [f"{self.name}: the pool is copied: {line[:200]}" for line in self.copies]
        if self.aliased_bytes < self.pool_bytes:
            found.append(
                f"{self.name}: the pool is copied: {self.aliased_bytes} bytes are updated in place, "
                f"the pool has {self.pool_bytes}"
            )
        return found


@dataclass(frozen=True)
class PoolReport:
    """The pool by the engine's own rule: `gpu_memory_utilization` of the memory that is left in JAX's share
    (`gpu_memory_fraction`) after weights, the largest program's temporaries and results, and the other arguments
    (adapter table, sequence state). All bytes are per device.

    Attributes:
      num_pages: with the dummy page.
      fits: the pool holds one sequence of the greatest length.
      tokens: capacity for KV without adapters.
      adapters: capacity for adapters of rank `adapter_rank` on every projection, without KV.
    """

    num_pages: int
    page_size: int
    page_bytes: int
    bytes: int
    fits: bool
    tokens: int
    adapter_rank: int
    adapter_pages: int
    adapters: int
    memory_bytes: int
    gpu_memory_fraction: float
    gpu_memory_utilization: float
    weight_bytes: int
    temp_bytes: int
    other_bytes: int


@dataclass(frozen=True)
class CompileReport:
    """The report of one model, configuration and GPU.

    Attributes:
      tensor_parallel_size, tp_lora: see `EngineConfig`.
      layers: of the model; the pool's size is for all of them.
      compiled_layers: of the programs and their bytes.
      weights: format of the layers' kernels; None: `dtype`.
      kv_dtype: see `EngineConfig`.
    """

    target: str
    tensor_parallel_size: int
    dtype: str
    layers: int
    compiled_layers: int
    max_lora_rank: int
    pool: PoolReport
    programs: tuple[ProgramReport, ...]
    tp_lora: str = "slora"
    weights: str | None = None
    kv_dtype: str = "auto"

    def problems(self) -> list[str]:
        return [problem for program in self.programs for problem in program.problems()]

    def to_json(self) -> dict[str, Any]:
        """Plain dictionaries and lists; the kernels' PTX is left out."""
        report = dataclasses.asdict(self)
        for program in report["programs"]:
            for kernel in program["kernels"]:
                del kernel["ptx"]
        return {**report, "problems": self.problems()}


def compile_report(
    model: ModelConfig,
    target: Target,
    config: EngineConfig,
    *,
    adapter_rank: int = 16,
    programs: Sequence[str] = (),
    layers: int | None = None,
    gpu_memory_fraction: float = 0.75,
) -> CompileReport:
    """Compiles the step programs of an engine with `config` for `target`.

    Args:
      config: `num_pages` is ignored, and dtype="auto" is bfloat16.
      adapter_rank: rank of the adapters whose number is reported.
      programs: names of the programs to compile; empty: all.
      layers: number of layers to compile; None: all.
      gpu_memory_fraction: JAX's share of the GPU's memory, as in XLA_PYTHON_CLIENT_MEM_FRACTION.

    Raises:
      ConfigError: a setting is out of range, or a package needed for compiling is not installed.
    """
    if config.dtype == "auto":
        config = dataclasses.replace(config, dtype="bfloat16")
    jobs, samplers = _jobs(config, programs)
    if not 1 <= adapter_rank <= config.max_lora_rank:
        raise ConfigError(f"rank={adapter_rank}: must be in 1..max_lora_rank={config.max_lora_rank}")
    if layers is not None and not 1 <= layers <= model.num_layers:
        raise ConfigError(f"layers={layers}: must be in 1..{model.num_layers}, the model's number of layers")
    longest = longest_sequence(model, config)
    cut(model, config.tensor_parallel_size, config.tp_lora)  # raises if the model cannot be cut
    _require_compilers()

    num_layers = layers or model.num_layers
    least = 1 + ceil_div(longest, config.page_size)
    parallel = _parallel(model, target, config)
    budget = _Budget.of(model, target, config, gpu_memory_fraction, parallel)
    bar = tqdm(
        total=1 + len(jobs) + len(samplers),
        desc="sizing the pool",
        unit="program",
        disable=not config.progress,
        leave=False,
    )
    with bar:
        said = _say_misfit(0, budget.pages(0, 0), least, budget)
        largest = max(jobs, key=lambda job: (job[0].tokens, job[1]))
        pages = max(least, budget.pages(0, 0) * 9 // 10)
        guess = _spec(model, min(SIZING_LAYERS, num_layers), config, pages, parallel)
        sizing = _compile(guess, target, *largest)
        other = sizing.argument_bytes - sizing.pool_bytes - _bytes(guess.params)
        step_bytes = sizing.temp_bytes + sizing.output_bytes
        num_pages = budget.pages(int(step_bytes * SIZING_MARGIN[0]) + SIZING_MARGIN[1], other)
        said = said or _say_misfit(step_bytes + other, num_pages, least, budget)
        bar.update()
        spec = _spec(model, num_layers, config, max(least, num_pages), parallel)
        done = []
        for bucket, with_lora in jobs:
            bar.set_description(f"compiling {_name(bucket, with_lora)}")
            done.append(_compile(spec, target, bucket, with_lora))
            bar.update()
        for kind, seqs in samplers:
            bar.set_description(f"compiling {after_step_name(kind, seqs)}")
            done.append(_compile_sampler(spec, target, kind, seqs))
            bar.update()

    temp = max(program.temp_bytes + program.output_bytes for program in done if not program.is_sampler)
    # A sampler runs after its step, whose logits are still there.
    temp = max([temp, *(p.temp_bytes + p.output_bytes + p.argument_bytes for p in done if p.is_sampler)])
    num_pages = max(0, min(num_pages, budget.pages(temp, other)))
    adapter_pages = int(spec.lora_layout.num_pages(np.full(len(PROJECTIONS), adapter_rank)))
    pool = PoolReport(
        num_pages=num_pages,
        page_size=config.page_size,
        page_bytes=budget.page_bytes,
        bytes=num_pages * budget.page_bytes,
        fits=num_pages >= least,
        tokens=max(0, num_pages - 1) * config.page_size,
        adapter_rank=adapter_rank,
        adapter_pages=adapter_pages,
        adapters=min(max(0, num_pages - 1) // adapter_pages, spec.pool.adapter_slots),
        memory_bytes=target.device.memory_bytes,
        gpu_memory_fraction=gpu_memory_fraction,
        gpu_memory_utilization=config.gpu_memory_utilization,
        weight_bytes=budget.weight_bytes,
        temp_bytes=temp,
        other_bytes=other,
    )
    return CompileReport(
        target=target.name,
        tensor_parallel_size=config.tensor_parallel_size,
        tp_lora=config.tp_lora,
        weights=model.weights,
        kv_dtype=config.kv_dtype,
        dtype=config.dtype,
        layers=model.num_layers,
        compiled_layers=num_layers,
        max_lora_rank=config.max_lora_rank,
        pool=pool,
        programs=tuple(done),
    )


@dataclass(frozen=True)
class _Budget:
    """Memory of one device.

    Attributes:
      memory_bytes: JAX's share.
      gpu_memory_utilization: the pool's part of what weights and programs leave.
      weight_bytes, page_bytes: of the model with all its layers.
    """

    memory_bytes: int
    gpu_memory_utilization: float
    weight_bytes: int
    page_bytes: int

    @classmethod
    def of(
        cls,
        model: ModelConfig,
        target: Target,
        config: EngineConfig,
        gpu_memory_fraction: float,
        parallel: TensorParallel | None,
    ) -> _Budget:
        spec = _spec(model, model.num_layers, config, 2, parallel)
        memory = int(target.device.memory_bytes * gpu_memory_fraction)
        return cls(memory, config.gpu_memory_utilization, _bytes(spec.params), spec.shard_pool.page_bytes)

    def pages(self, temp_bytes: int, other_bytes: int) -> int:
        """Pages that fit; zero or negative if nothing is left."""
        free = self.memory_bytes - self.weight_bytes - temp_bytes - other_bytes
        return int(free * self.gpu_memory_utilization) // self.page_bytes


def _say_misfit(step_bytes: int, num_pages: int, least: int, budget: _Budget) -> bool:
    """Warns on stderr, before minutes of compiling, if the pool does not hold one sequence of the greatest length.
    Returns whether it warned."""
    if num_pages >= least:
        return False
    sizes = [f"{nbytes / 2**30:.2f} GiB" for nbytes in (budget.memory_bytes, budget.weight_bytes, step_bytes)]
    tqdm.write(
        f"DOES NOT FIT: of {sizes[0]}, weights take {sizes[1]} and a step {sizes[2]}, which leaves "
        f"{max(0, num_pages)} pages; one sequence of the greatest length takes {least}. Compiling the programs "
        "nevertheless (Ctrl-C stops)",
        file=sys.stderr,
    )
    return True


def _name(bucket: Bucket, with_lora: bool) -> str:
    return bucket.name + ("_lora" if with_lora else "")


def _jobs(config: EngineConfig, names: Sequence[str]) -> tuple[list[tuple[Bucket, bool]], list[tuple[str, int]]]:
    """Returns the steps (bucket, with LoRA), and the programs after them (kind, sequences), to compile."""
    buckets = config.buckets()
    steps = {_name(bucket, with_lora): (bucket, with_lora) for bucket in buckets for with_lora in (False, True)}
    all_seqs = sorted({bucket.seqs for bucket in buckets})
    samplers = {after_step_name(kind, seqs): (kind, seqs) for kind in AFTER_STEP for seqs in all_seqs}
    for name in names:
        if name not in steps | samplers:
            raise ConfigError(f"programs: there is no {name!r}; choose from {', '.join((*steps, *samplers))}")
    if names and not steps.keys() & set(names):
        raise ConfigError(f"programs: no step among {', '.join(names)}; name one of {', '.join(steps)}")
    return (
        [job for name, job in steps.items() if not names or name in names],
        [job for name, job in samplers.items() if not names or name in names],
    )


def _require_compilers() -> None:
    """Raises ConfigError if a package needed for compiling is missing."""
    missing = [] if importlib.util.find_spec("jax_triton") else ["jax-triton"]
    if not any(importlib.util.find_spec(plugin) for plugin in ("jax_cuda12_plugin", "jax_cuda13_plugin")):
        missing.insert(0, "JAX's CUDA plugin")
    if missing:
        raise ConfigError(
            f"compiling for a GPU needs {' and '.join(missing)}: install the extra that has it (no GPU is needed), "
            "make install EXTRAS=cuda12"
        )
    ptxas()


def _parallel(model: ModelConfig, target: Target, config: EngineConfig) -> TensorParallel | None:
    """Layout of the model on `config.tensor_parallel_size` absent devices."""
    if config.tensor_parallel_size == 1:
        return None
    return TensorParallel(
        cut(model, config.tensor_parallel_size, config.tp_lora), deviceless_mesh(target, config.tensor_parallel_size)
    )


def _spec(
    model: ModelConfig, num_layers: int, config: EngineConfig, num_pages: int, parallel: TensorParallel | None
) -> StepSpec:
    model = dataclasses.replace(model, num_layers=num_layers)
    if parallel is None:
        graphdef, params = abstract_decoder(model, config.dtype)
    else:
        graphdef, params = abstract_shards(model, config.dtype, parallel)
    shape = pool_shape(model, dataclasses.replace(config, num_pages=num_pages))
    return step_spec(model, graphdef, params, config, shape, parallel)


def _compile(spec: StepSpec, target: Target, bucket: Bucket, with_lora: bool) -> ProgramReport:
    start = time.perf_counter()
    with compiling_for(target.device):
        layout = spec.layout(bucket)
        compiled = compile_for(target, make_step(spec, layout, with_lora), *step_shapes(spec, layout))
    seconds = time.perf_counter() - start
    use = pool_use(compiled, spec.shard_pool)
    memory = compiled.memory_analysis()
    return ProgramReport(
        name=_name(bucket, with_lora),
        tokens=bucket.tokens,
        seqs=bucket.seqs,
        with_lora=with_lora,
        compile_seconds=round(seconds, 3),
        argument_bytes=memory.argument_size_in_bytes,
        temp_bytes=use.temp_bytes,
        output_bytes=memory.output_size_in_bytes - memory.alias_size_in_bytes,
        aliased_bytes=use.aliased_bytes,
        pool_bytes=use.pool_bytes,
        launches=launches(compiled.as_text()),
        copies=use.copies,
        kernels=tuple(kernels_in(compiled, target.device)),
        collectives=tuple(collectives_in(compiled)),
    )


def _compile_sampler(spec: StepSpec, target: Target, kind: str, seqs: int) -> ProgramReport:
    start = time.perf_counter()
    make, shapes = AFTER_STEP[kind]
    compiled = compile_for(target, make(spec, seqs), *shapes(spec, seqs))
    memory = compiled.memory_analysis()
    return ProgramReport(
        name=after_step_name(kind, seqs),
        tokens=seqs,
        seqs=seqs,
        with_lora=False,
        compile_seconds=round(time.perf_counter() - start, 3),
        argument_bytes=memory.argument_size_in_bytes,
        temp_bytes=memory.temp_size_in_bytes,
        output_bytes=memory.output_size_in_bytes - memory.alias_size_in_bytes,
        aliased_bytes=memory.alias_size_in_bytes,
        pool_bytes=0,  # it does not read the pool
        launches=launches(compiled.as_text()),
        copies=(),
        kernels=tuple(kernels_in(compiled, target.device)),
        collectives=tuple(collectives_in(compiled)),
    )


def _bytes(params: Params) -> int:
    """Bytes of the parameters per device."""
    shards = (
        jax.ShapeDtypeStruct(leaf.sharding.shard_shape(leaf.shape) if leaf.sharding else leaf.shape, leaf.dtype)
        for leaf in jax.tree.leaves(params)
    )
    return sum(map(num_bytes, shards))
