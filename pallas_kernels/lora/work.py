"""The LoRA kernels' work tables: one row per tile, one table per stack, built once per step for all layers."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from pallas_kernels.lora.layout import LoraLayout, Stack
from pallas_kernels.lora.tiles import LoraTiles

FIELDS = ("first_row", "rows", "slot", "a_base", "b_base", "wide_blocks", "end0", "end1", "end2")
"""Columns of a work table. `first_row`, `rows`: the tile's rows of the step (0 rows past the list's end). `slot`: row
of the adapter table. `a_base`, `b_base`, `wide_blocks`: see `layout.StackTiles`. `end0..2`: rows of the stack up to and
including each projection (a stack with fewer repeats the last): projection p owns rows `end[p-1]` to `end[p]`, and
`end2` is the stack's rank. The same rows hold for A and B, unless A is sharded by rank."""


def stack_work(
    layout: LoraLayout,
    ranks: jax.Array,
    tiles: LoraTiles,
    *,
    of_a: bool = False,
) -> tuple[jax.Array, ...]:
    """Returns the work table of every stack: int32 `[NT, len(FIELDS)]`.

    Args:
      ranks: int32 `[slots, 7]`.
      of_a: `end0..2` count a shard's rows of A.
    """
    slot = tiles.slot
    live = jnp.arange(slot.shape[0]) < tiles.num_tiles
    rows = jnp.where(live, tiles.rows, 0)
    ranks = jnp.where(live[:, None], ranks[slot], 0)  # [NT, 7]
    stack_tiles, _ = layout.stack_tiles(ranks)

    def table(stack: Stack, number: int) -> jax.Array:
        ends: list[jax.Array] = []
        end = jnp.zeros_like(slot)
        for position in range(3):
            if position < len(stack.projections):
                rank = ranks[:, stack.rank_index[position]]
                end = end + (stack.a_ranks(rank) if of_a else rank)
            ends.append(end)
        t = stack_tiles[number]
        columns = [tiles.first_row, rows, slot, t.a_base, t.b_base, t.wide_blocks, *ends]
        return jnp.stack(columns, axis=1).astype(jnp.int32)

    return tuple(table(stack, number) for number, stack in enumerate(layout.stacks))
