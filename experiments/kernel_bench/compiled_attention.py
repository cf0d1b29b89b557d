"""Rows of the attention kernel for `experiments.kernel_bench.compiled`: a layer of Llama-3-8B.

The old kernel launched a block for every row of the work table and key-value head. In the new one, the programs of a
persistent grid take the pairs of an item and a head.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.bench.models import LLAMA_3_8B
from pallas_kernels.devices import Device, compiling_for
from pallas_kernels.lora.layout import ceil_div
from pallas_kernels.paged_attention import AttentionTiles, PagedAttention
from pallas_kernels.paged_attention.plan import AttentionShape, triton_plan
from pallas_kernels.paged_attention.work import WorkShape, count_items
from pallas_kernels.targets import TARGETS, lower_for
from slora_jax.analysis import kernels_in

Row = dict[str, Any]

MODEL, PAGE_SIZE, MAX_PAGES, NUM_PAGES, TILE_ROWS = LLAMA_3_8B, 16, 2048, 4000, 64


@dataclass(frozen=True)
class Program:
    """A kernel: one layer of a step of at most `rows` rows of `seqs` sequences; decode: one row each."""

    rows: int
    seqs: int
    decode: bool

    @property
    def shape(self) -> AttentionShape:
        return AttentionShape(
            MODEL.num_heads, MODEL.num_kv_heads, MODEL.head_dim, PAGE_SIZE, jnp.dtype("bfloat16"), self.seqs, MAX_PAGES,
            self.rows, self.decode,
        )  # fmt: skip

    def lower(self, device: str) -> Any:
        """Lowers one call."""

        def struct(*shape: int, dtype: str = "int32") -> Any:
            return jax.ShapeDtypeStruct(shape, jnp.dtype(dtype))

        def run(q: jax.Array, pool: jax.Array, tiles: AttentionTiles) -> jax.Array:
            attend = PagedAttention(
                tiles, num_heads=MODEL.num_heads, num_kv_heads=MODEL.num_kv_heads, head_dim=MODEL.head_dim,
                page_size=PAGE_SIZE, dtype="bfloat16", decode=self.decode, tile_rows=TILE_ROWS, implementation="triton",
            )  # fmt: skip
            return attend(q, pool)

        num_tiles = 0 if self.decode else ceil_div(self.rows, TILE_ROWS) + self.seqs
        seqs, prefill = struct(self.seqs), struct(num_tiles)
        table = struct(self.seqs, MAX_PAGES)
        tiles = AttentionTiles(table, seqs, seqs, seqs, prefill, prefill, struct(), seqs, struct())
        q = struct(self.rows, MODEL.num_heads, MODEL.head_dim, dtype="bfloat16")
        pool = struct(NUM_PAGES, 2, PAGE_SIZE, MODEL.width, dtype="bfloat16")
        return lower_for(TARGETS[device], jax.jit(run), q, pool, tiles)


def _ragged(batch: int) -> np.ndarray:
    """Contexts of 64 to 8,191 tokens."""
    return np.random.default_rng(0).integers(64, 8192, batch)


CASES: dict[str, tuple[Program, np.ndarray, np.ndarray]] = {
    f"decode batch={batch} context={context}": (
        Program(batch, batch, True), np.ones(batch, int), np.full(batch, context - 1)
    )
    for batch in (16, 64, 256) for context in (1024, 4096, 32768)
} | {
    "decode batch=64 context=64..8191": (Program(64, 64, True), np.ones(64, int), _ragged(64)),
    "mixed rows=4096 seqs=256: prompt of 3969, 127 decode at 64..8191": (
        Program(4096, 256, False), np.append(np.ones(127, int), 3969), np.append(_ragged(127), 0)
    ),
}  # fmt: skip
"""Program, and the rows and the tokens before them of each sequence."""


def rows(device: Device) -> Iterator[Row]:
    """Compiles the kernel for `device` and yields its rows. They also have `shared_bytes`, `per_sm` (resident programs
    of a multiprocessor), `work` (pairs of an item and a head) and `waves` (`work` over resident programs)."""
    found: dict[Program, Any] = {}
    for program in dict.fromkeys(program for program, _, _ in CASES.values()):
        (found[program],) = kernels_in(program.lower(device.name), device)
    for case, (program, *step) in CASES.items():
        yield _row(case, device, found[program], program.shape, *step)


def _row(case: str, device: Device, use: Any, shape: AttentionShape, rows: np.ndarray, context: np.ndarray) -> Row:
    with compiling_for(device):
        plan = triton_plan(shape)
        work = WorkShape.of(shape, plan)
    pairs = sum(count_items(rows, context, work)) * shape.num_kv_heads
    return {
        "kernel": "attention",
        "case": case,
        "device": device.name,
        "version": "new",
        "registers": use.registers,
        "shared_bytes": use.shared_bytes,
        "launches": use.count,
        "blocks": work.grid,
        "dead_blocks": max(0, work.grid - pairs),
        "per_sm": plan.per_sm,
        "work": pairs,
        "waves": round(pairs / work.programs, 2),
    }
