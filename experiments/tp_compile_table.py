"""Large models over several GPUs that are not there: what a device holds, and what the shards send each other.

`python -m experiments.tp_compile_table` compiles the step programs of the paper's 30B and 70B shapes, Llama-3-70B and
Qwen3-32B for 4 and 8 H200s, prints a table and writes it as JSON. A step is compiled for a batch of decoding sequences
and for one with prompts, both with adapters. Pages left are counted with all of a model's layers, however many are
compiled; the collectives of every program are held against the formulas of `slora_jax.parallel.cost`.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from experiments.machine import provenance, write_json
from experiments.paper.settings import MODELS
from pallas_kernels.lora.layout import PROJECTIONS
from pallas_kernels.targets import TARGETS
from slora_jax.analysis.report import CompileReport, ProgramReport, compile_report
from slora_jax.engine import EngineConfig, adapter_geometry
from slora_jax.models import ModelConfig
from slora_jax.models.config import read_json
from slora_jax.parallel.cost import base_messages, lora_messages, vocabulary_messages
from slora_jax.parallel.mesh import cut

SHAPES = ("llama-30b", "llama-70b", "llama-3-70b", "qwen3-32b")
DEGREES = (4, 8)
RANKS = (16, 64)
OUT = Path(__file__).parent / "results" / "compile_reports" / "tensor_parallel_h200.json"
CONFIG = EngineConfig(
    dtype="bfloat16",
    max_num_seqs=256,
    max_num_batched_tokens=2048,
    max_model_len=2048,
    max_lora_rank=64,
    decode_buckets=(256,),
    mixed_buckets=(2048,),
    progress=False,
)
PROGRAMS = ("decode_256_lora", "mixed_2048_lora", "sample_256")


@dataclass(frozen=True)
class Program:
    """rows: of the step. layer_collectives: of one layer, (kind, bytes of one, count). layer_bytes: together; sent: by
    a device in a ring. as_published: all collectives of the program are those of the formulas, to the byte. spills:
    bytes a thread, of the worst kernel."""

    name: str
    rows: int
    compile_seconds: float
    temp_bytes: int
    layer_collectives: tuple[tuple[str, int, int], ...]
    layer_bytes: int
    sent_bytes: int
    as_published: bool
    spills: int
    pool_copies: int


@dataclass(frozen=True)
class Row:
    """A model over `tensor_parallel_size` devices; bytes are one device's. adapters: by rank (on every
    projection), how many a pool without KV holds; tokens: of KV, without adapters."""

    model: str
    tensor_parallel_size: int
    layers: int
    compiled_layers: int
    weight_bytes: int
    temp_bytes: int
    pages: int
    page_bytes: int
    tokens: int
    adapters: dict[str, int]
    programs: tuple[Program, ...]

    @property
    def is_sound(self) -> bool:
        return all(p.as_published and not p.spills and not p.pool_copies for p in self.programs)


def compile_row(name: str, tp: int, target: str = "h200", layers: int | None = None) -> Row:
    """Compiles a model of `experiments/models` for `tp` devices; `layers` of it, or all."""
    model = ModelConfig.from_dict(read_json(MODELS / f"{name}.json"))
    config = EngineConfig(**{**asdict(CONFIG), "tensor_parallel_size": tp})
    report = compile_report(model, TARGETS[target], config, programs=PROGRAMS, layers=layers)
    shards = cut(model, tp)
    layout = shards.of_layout(adapter_geometry(model, config.page_size).layout)
    pages = {str(rank): int(layout.num_pages(np.full(len(PROJECTIONS), rank))) for rank in RANKS}
    pool = report.pool
    return Row(
        model=name,
        tensor_parallel_size=tp,
        layers=report.layers,
        compiled_layers=report.compiled_layers,
        weight_bytes=pool.weight_bytes,
        temp_bytes=pool.temp_bytes,
        pages=pool.num_pages,
        page_bytes=pool.page_bytes,
        tokens=pool.tokens,
        adapters={rank: (pool.num_pages - 1) // count for rank, count in pages.items()},
        programs=tuple(_program(p, model, config, report) for p in report.programs if not p.is_sampler),
    )


def _program(program: ProgramReport, model: ModelConfig, config: EngineConfig, report: CompileReport) -> Program:
    shards, itemsize = cut(model, report.tensor_parallel_size), jnp.dtype(config.dtype).itemsize
    rows = program.tokens
    layer = base_messages(model.hidden_size, rows, itemsize) + lora_messages(
        shards, rows, config.max_lora_rank, itemsize
    )
    once = vocabulary_messages(model.hidden_size, shards, rows, program.seqs, itemsize)
    published = Counter((m.kind, m.bytes) for m in layer * report.compiled_layers + once)
    found: Counter[tuple[str, int]] = Counter()
    of_layer: Counter[tuple[str, int]] = Counter()
    for collective in program.collectives:
        found[collective.kind, collective.bytes] += collective.count
        if collective.purpose in ("base", "lora"):
            of_layer[f"{collective.purpose} {collective.kind}", collective.bytes] += collective.count
    per_layer = tuple((kind, size, count // report.compiled_layers) for (kind, size), count in of_layer.items())
    return Program(
        name=program.name,
        rows=rows,
        compile_seconds=program.compile_seconds,
        temp_bytes=program.temp_bytes,
        layer_collectives=per_layer,
        layer_bytes=sum(size * count for _, size, count in per_layer),
        sent_bytes=int(sum(message.sent(report.tensor_parallel_size) for message in layer)),
        as_published=found == published,
        spills=max((kernel.spill_bytes for kernel in program.kernels), default=0),
        pool_copies=len(program.copies) + (program.aliased_bytes < program.pool_bytes),
    )


def table(rows: Sequence[Row]) -> str:
    """Markdown, a line a row."""
    lines = [
        "| model | GPUs | layers compiled | weights | temporaries | pages left | KV tokens | adapters r=16 / r=64 "
        "| collectives a layer | sent a layer and row | as published | spills |",
        "|" + "---|" * 12,
    ]
    for row in rows:
        mixed = row.programs[-1]
        kinds = ", ".join(f"{count} {kind}" for kind, _, count in _merged(mixed.layer_collectives))
        lines.append(
            f"| {row.model} | {row.tensor_parallel_size} | {row.compiled_layers} of {row.layers} "
            f"| {row.weight_bytes / 1e9:.1f} GB "
            f"| {row.temp_bytes / 1e6:.0f} MB | {row.pages} | {row.tokens} "
            f"| {row.adapters['16']} / {row.adapters['64']} | {kinds} | {mixed.sent_bytes / mixed.rows:.0f} B "
            f"| {'yes' if all(p.as_published for p in row.programs) else 'NO'} "
            f"| {max(p.spills for p in row.programs)} |"
        )
    return "\n".join(lines)


def _merged(collectives: Sequence[tuple[str, int, int]]) -> list[tuple[str, int, int]]:
    """By kind."""
    kinds = dict.fromkeys(kind for kind, _, _ in collectives)
    return [
        (kind, sum(size * n for k, size, n in collectives if k == kind), sum(n for k, _, n in collectives if k == kind))
        for kind in kinds
    ]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="*", default=SHAPES, help="of experiments/models")
    parser.add_argument("--degrees", nargs="*", type=int, default=DEGREES, help="devices")
    parser.add_argument("--target", default="h200", choices=sorted(TARGETS))
    parser.add_argument("--layers", type=int, help="compile so many only: faster, and labelled so")
    parser.add_argument("--out", type=Path, default=OUT, help="JSON file")
    args = parser.parse_args()
    os.environ |= {"JAX_PLATFORMS": "cpu", "JAX_SKIP_CUDA_CONSTRAINTS_CHECK": "1"}  # the compiler runs on the host
    jax.config.update("jax_platforms", "cpu")
    rows = []
    for name in args.models:
        for tp in args.degrees:
            rows.append(compile_row(name, tp, args.target, args.layers))
            print(f"{name} on {tp}: {rows[-1].pages} pages", file=sys.stderr, flush=True)
    content: dict[str, Any] = {
        "command": " ".join(["python -m experiments.tp_compile_table", *sys.argv[1:]]),
        **provenance(("jax", "jaxlib", "jax-triton", "numpy")),
        "target": args.target,
        "config": {"max_lora_rank": CONFIG.max_lora_rank, "page_size": CONFIG.page_size, "gpu_memory_fraction": 0.75},
        "rows": [asdict(row) for row in rows],
    }
    print(table(rows))
    write_json(args.out, content)
    return 0 if all(row.is_sound for row in rows) else 1


if __name__ == "__main__":
    sys.exit(main())
