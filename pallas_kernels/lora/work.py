"""The LoRA kernels' work tables, built once per step for all layers."""

from __future__ import annotations

from dataclasses import dataclass

import jax
import jax.numpy as jnp

from pallas_kernels.lora.layout import LoraLayout, Stack, ceil_div
from pallas_kernels.lora.tiles import LoraTiles

FIELDS = 8
"""Columns of both tables."""

MOST_COMPARED = 1024
"""Most tiles that each item is compared with; among more, it is found by bisection."""


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


def lora_work(
    layout: LoraLayout, ranks: jax.Array, tiles: LoraTiles, *, max_rank: int, block_r: int, base: jax.Array | int = 0
) -> LoraWork:
    """Builds the work tables of a step.

    Args:
      ranks: int32 `[NT, 7]`, of each tile's adapter.
      max_rank: bound of any projection's rank.
      block_r: ranks of an item, whole tiles.
      base: the adapter's tile from which the stacks are placed, int32 `[NT]`.
    """
    rows = jnp.where(jnp.arange(tiles.slot.shape[0]) < tiles.num_tiles, tiles.rows, 0)
    ranks = jnp.where(rows[:, None] > 0, ranks, 0)
    common, none = [tiles.first_row, rows, tiles.slot], jnp.zeros_like(rows)
    places, _ = layout.stack_tiles(ranks, base)

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
    tile = _count_up_to(past[:, :-1], item)  # [stacks, I + 1]; NT, a row of zeros, past the last item
    block = item - jnp.take_along_axis(past - blocks, tile, 1)
    a = jnp.take_along_axis(a, tile[:, :, None], 1)  # [stacks, I + 1, FIELDS]
    step = jnp.array([[layout.a_chunks(stack) * (block_r // layout.page_size)] for stack in layout.stacks])
    first = jnp.stack([a[:, :, 3] + block * step, block * block_r], 2)
    return LoraWork(b, jnp.where(a[:, :, 1:2] > 0, jnp.concatenate([a[:, :, :3], first, a[:, :, 5:]], 2), 0))


def _count_up_to(ascending: jax.Array, values: jax.Array) -> jax.Array:
    """Number of entries of each row of `ascending [stacks, N]` that are at most each of `values [I]`: `[stacks, I]`."""
    if ascending.shape[1] <= MOST_COMPARED:
        return (ascending[:, None] <= values[:, None]).sum(2)
    return jax.vmap(lambda row: jnp.searchsorted(row, values, side="right", method="scan_unrolled"))(ascending)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class GradientWork:
    """The work of every stack's product and of its backward pass.

    Both tables of adapters have a row for each adapter of the step: `first_tile, tiles, slot, base, wide_blocks, end0,
    end1, end2`. `first_tile` and `tiles` are its row tiles, which follow one another; `base` is its first tile of A or
    B, and the other fields are those of `LoraWork.tiles`. In `a_adapters`, one projection has all of a stack's ranks.

    Attributes:
      pages: int32 `[slots, max_pages]`, see `AdapterTable`.
      first_row: int32 `[NT]`, of each row tile.
      forward: of `y + (x A) B`.
      backward: of `dx + g A`, which is expand's product with A in B's place; `items` is not used.
      a_adapters, b_adapters: int32 `[stacks, NT + 1, FIELDS]`.
    """

    pages: jax.Array
    first_row: jax.Array
    forward: LoraWork
    backward: LoraWork
    a_adapters: jax.Array
    b_adapters: jax.Array


def gradient_work(layout: LoraLayout, pages: jax.Array, tiles: LoraTiles, forward: LoraWork) -> GradientWork:
    """Derives a micro-step's work tables from those of the forward pass. No stack may be sharded by rank."""
    b_tiles = forward.tiles
    rank = b_tiles[:, :, 7]
    chunks = jnp.array([layout.a_chunks(stack) for stack in layout.stacks])[:, None]
    a_base = b_tiles[:, :, 3] - ceil_div(rank, layout.page_size) * chunks
    a_tiles = jnp.concatenate([b_tiles[:, :, :3], jnp.stack([a_base, 0 * rank, rank, rank, rank], 2)], 2)
    live, slot = b_tiles[0, :, 1] > 0, b_tiles[0, :, 2]
    adapter = jnp.cumsum(live & (slot != jnp.roll(slot, 1)).at[0].set(True)) - 1  # of each tile
    own = live & (adapter == jnp.arange(live.shape[0])[:, None])  # [NT + 1 adapters, NT + 1 tiles]
    first, count = own.argmax(1), own.sum(1)
    spans = jnp.broadcast_to(jnp.stack([first, count], 1), (len(layout.stacks), *first.shape, 2))

    def adapters(of_tiles: jax.Array) -> jax.Array:
        table = jnp.concatenate([spans, of_tiles[:, first, 2:]], 2).astype(jnp.int32)
        return jnp.where(count[:, None] > 0, table, 0)

    backward = LoraWork(a_tiles, forward.items)
    return GradientWork(pages, tiles.first_row, forward, backward, adapters(a_tiles), adapters(b_tiles))
