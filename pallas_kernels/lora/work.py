"""The LoRA kernels' work tables, built once per step for all layers."""

from __future__ import annotations

from dataclasses import dataclass

import jax
import jax.numpy as jnp

from pallas_kernels.lora.layout import LoraLayout, Stack, ceil_div
from pallas_kernels.lora.tiles import LoraTiles

FIELDS = 8
"""Columns of both tables."""


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class LoraWork:
    """The work of every stack. Rows past a table's end are zeros, and each table has at least one such row.

    Projection p owns the stack's ranks `end[p-1]` to `end[p]`; a stack with fewer than three projections repeats the
    last, so `end2` is the stack's rank. In `items`, ends count a shard's ranks if A is sharded by rank.

    Attributes:
      tiles: int32 `[stacks, NT + 1, FIELDS]`, what expand computes: `first_row, rows, slot, b_base, wide_blocks, end0,
        end1, end2`. `first_row` and `rows` are the tile's rows of the step, `slot` its row of the adapter table;
        `b_base` and `wide_blocks` are those of `layout.StackTiles`.
      items: int32 `[stacks, I + 1, FIELDS]`, what shrink computes, a tile and a block of ranks: `first_row, rows, slot,
        a_tile, rank, end0, end1, end2`. `rank` is the block's first, and `a_tile` its tile of A in column chunk 0.
    """

    tiles: jax.Array
    items: jax.Array


def lora_work(layout: LoraLayout, ranks: jax.Array, tiles: LoraTiles, *, max_rank: int, block_r: int) -> LoraWork:
    """Builds the work tables of a step.

    Args:
      ranks: int32 `[slots, 7]`.
      max_rank: bound of any projection's rank.
      block_r: ranks of an item, whole tiles.
    """
    rows = jnp.where(jnp.arange(tiles.slot.shape[0]) < tiles.num_tiles, tiles.rows, 0)
    ranks = jnp.where(rows[:, None] > 0, ranks[tiles.slot], 0)  # [NT, 7]
    common, none = [tiles.first_row, rows, tiles.slot], jnp.zeros_like(rows)
    places, _ = layout.stack_tiles(ranks)

    def table(*columns: jax.Array) -> jax.Array:
        return jnp.pad(jnp.stack([*common, *columns], 1).astype(jnp.int32), ((0, 1), (0, 0)))

    def ends(stack: Stack, of_a: bool = False) -> list[jax.Array]:
        own = [ranks[:, i] for i in stack.rank_index]
        own = [stack.a_ranks(rank) if of_a else rank for rank in own]
        return [sum(own[: p + 1], none) for p in range(3)]

    each = list(zip(layout.stacks, places, strict=True))
    b = jnp.stack([table(place.b_base, place.wide_blocks, *ends(stack)) for stack, place in each])
    a = jnp.stack([table(place.a_base, none, *ends(stack, of_a=True)) for stack, place in each])
    blocks = ceil_div(a[:, :, -1], block_r)  # [stacks, NT + 1]
    past = jnp.cumsum(blocks, 1)
    most = max(ceil_div(len(stack.projections) * stack.a_ranks(max_rank), block_r) for stack in layout.stacks)
    item = jnp.arange(most * rows.shape[0] + 1)
    tile = (past[:, None, :-1] <= item[:, None]).sum(2)  # [stacks, I + 1]; NT, a row of zeros, past the last item
    block = item - jnp.take_along_axis(past - blocks, tile, 1)
    a = jnp.take_along_axis(a, tile[:, :, None], 1)  # [stacks, I + 1, FIELDS]
    step = jnp.array([[layout.a_chunks(stack) * (block_r // layout.page_size)] for stack in layout.stacks])
    first = jnp.stack([a[:, :, 3] + block * step, block * block_r], 2)
    return LoraWork(b, jnp.where(a[:, :, 1:2] > 0, jnp.concatenate([a[:, :, :3], first, a[:, :, 5:]], 2), 0))
