"""Rows of the LoRA kernels for `experiments.kernel_bench.compiled`: a layer of Llama-3-8B."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels.bench.adapters import max_pages
from pallas_kernels.bench.models import LLAMA_3_8B
from pallas_kernels.devices import Device, compiling_for
from pallas_kernels.lora import AdapterTable, LoraProduct, LoraTiles, Stack, lora_tile_rows
from pallas_kernels.lora.layout import ceil_div
from pallas_kernels.lora.plan import block_ranks, expand_plan, shrink_plan
from pallas_kernels.targets import TARGETS, lower_for
from slora_jax.analysis import KernelUse, kernels_in
from slora_jax.analysis.sass import executed, loops

DTYPE, SLOTS, MAX_RANK, NUM_PAGES = jnp.bfloat16, 256, 128, 2**15


@dataclass(frozen=True)
class Step:
    """A step of `rows` rows, spread evenly over `adapters` adapters of rank `rank` on every projection."""

    rows: int
    adapters: int
    rank: int
    decode: bool

    def __str__(self) -> str:
        return f"{'decode' if self.decode else 'prefill'} rows={self.rows} adapters={self.adapters} rank={self.rank}"


STEPS = (Step(64, 64, 16, True), Step(64, 64, 64, True), Step(4096, 64, 16, False), Step(4096, 64, 64, False))
LAYOUT = LLAMA_3_8B.layout()


def rows(
    device: Device, steps: Sequence[Step] = STEPS, stacks: Sequence[Stack] = LAYOUT.stacks
) -> Iterator[dict[str, Any]]:
    """Compiles the two kernels of every stack for `device`, once for each regime: ranks are data."""
    for stack in stacks:
        for step in steps:
            yield from _rows(device, step, stack)


def _rows(device: Device, step: Step, stack: Stack) -> Iterator[dict[str, Any]]:
    """The rows of a stack's two kernels in one step."""
    with compiling_for(device):
        tile_rows = lora_tile_rows(LAYOUT, DTYPE, decode=step.decode)
        facts = {"decode": step.decode, "rows": step.rows, "width": LAYOUT.width, "page_size": LAYOUT.page_size}
        shrink, expand = shrink_plan(d_in=stack.d_in, **facts), expand_plan(d_out=stack.d_out, **facts)
        block_r = block_ranks(LAYOUT.page_size, backend="triton", decode=step.decode)
    tiles = step.adapters * ceil_div(step.rows // step.adapters, tile_rows)
    total, blocks = len(stack.projections) * step.rank, ceil_div(step.rank, LAYOUT.page_size)
    items = {
        "lora_shrink_kernel": tiles * ceil_div(total, block_r) * shrink.splits(stack.d_in),
        "lora_expand_kernel": tiles * sum(ceil_div(d, expand.block_n) for d in stack.d_outs),
    }
    kib = {"lora_shrink_kernel": total * stack.d_in, "lora_expand_kernel": step.rank * stack.d_out}
    inner = {"lora_shrink_kernel": ceil_div(shrink.slice_k, shrink.block_k), "lora_expand_kernel": blocks - 1}
    for use in _kernels(device, step.rows, step.decode, tile_rows, stack):
        # The programs' loop over items is the outer one, if there is one; here, it runs once.
        iterations = [1] * (len(loops(use.ptx)) - 1) + [inner[use.name]]
        instructions = sum(executed(use.ptx, iterations).values()) * use.warps * items[use.name]
        yield {
            "kernel": use.name.removesuffix("_kernel"),
            "case": f"{step} {stack.name}",
            "device": device.name,
            "version": "new",
            "registers": use.registers,
            "instructions_per_kb": round(instructions / (tiles * kib[use.name] * DTYPE.dtype.itemsize / 1024), 1),
            "launches": use.count,
            "blocks": use.blocks,
            "dead_blocks": max(0, use.blocks - items[use.name]),
        }


@cache
def _kernels(device: Device, rows: int, decode: bool, tile_rows: int, stack: Stack) -> list[KernelUse]:
    """The kernels of one stack's product in a step of at most `SLOTS` sequences."""

    def struct(*shape: int, dtype: Any = jnp.int32) -> Any:
        return jax.ShapeDtypeStruct(shape, dtype)

    def run(y: Any, x: Any, pool: Any, table: AdapterTable, tiles: LoraTiles) -> Any:
        lora = LoraProduct(
            LAYOUT, table, tiles, dtype=DTYPE, decode=decode, tile_rows=tile_rows, max_rank=MAX_RANK,
            implementation="triton",
        )  # fmt: skip
        return lora(x, y, pool, stack)

    entries = ceil_div(rows, tile_rows) + min(rows, SLOTS)
    table = AdapterTable(struct(SLOTS, max_pages(LAYOUT, MAX_RANK)), struct(SLOTS, 7))
    tile, number = struct(entries), struct()
    tiles = LoraTiles(tile, tile, tile, struct(rows), number, number, number, number)
    pool = struct(NUM_PAGES, 2, LAYOUT.page_size, LAYOUT.width, dtype=DTYPE)
    x, y = struct(rows, stack.d_in, dtype=DTYPE), struct(rows, stack.d_out, dtype=DTYPE)
    program = lower_for(TARGETS[device.name], jax.jit(run, donate_argnums=0), y, x, pool, table, tiles)
    return kernels_in(program, device)
