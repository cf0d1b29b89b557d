"""LoRA on experts: each expert of each adapter slot is an adapter of its own, of the rows that the router sends to it.

All backends use these XLA operations.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels.experts.xla import Add
from pallas_kernels.lora import xla
from pallas_kernels.lora.layout import EXPERT_PROJECTIONS, PROJECTIONS, RANKS, LoraLayout
from pallas_kernels.lora.tiles import AdapterTable, LoraTiles

TILE_ROWS = 16
"""Most rows of one expert of one adapter in one product."""


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class ExpertTable:
    """The experts of the adapters of a step, located once for all layers.

    Attributes:
      pages: int32 `[slots, max_pages]`, see `AdapterTable`.
      ranks: int32 `[slots, E, 3]`, see `AdapterTable.experts`.
      first_tile: int32 `[slots, E]`, counted from the adapter's first.
      row_slot: int32 `[T]`, adapter slot of each row of the step.
      lora_rows: int32, rows with an adapter. They come first.
    """

    pages: jax.Array
    ranks: jax.Array
    first_tile: jax.Array
    row_slot: jax.Array
    lora_rows: jax.Array


def prepare(layout: LoraLayout, table: AdapterTable, tiles: LoraTiles) -> ExpertTable:
    """Locates every expert of every slot."""
    assert table.experts is not None
    first_tile = layout.expert_tiles(table.ranks[:, :RANKS], table.experts)[0]
    return ExpertTable(table.pages, table.experts, first_tile, tiles.row_slot, tiles.lora_rows)


def products(
    table: ExpertTable, chosen: jax.Array, order: jax.Array, pool: jax.Array, layout: LoraLayout, max_rank: int
) -> tuple[Add, Add]:
    """Returns the LoRA products of gate | up and of down in one layer.

    Args:
      chosen: int32 `[T, k]`, each token's experts; E is none.
      order: int32 `[T k]`, the rows (`token * k + j`) by expert, and in ascending order for each expert.
      pool: the layer's pool `[num_pages, 2, page_size, W]`.

    Returns:
      Functions of rows in this order. Rows without LoRA on their expert keep the bits of y.
    """
    tiles, expert = _row_tiles(table, chosen, order)
    experts = layout.expert
    others = len(PROJECTIONS) - len(EXPERT_PROJECTIONS)
    ranks = jnp.pad(table.ranks.at[tiles.slot, expert].get(**xla.CLIP), ((0, 0), (others, 0)))  # [NT, 7]
    places, _ = experts.stack_tiles(ranks, table.first_tile.at[tiles.slot, expert].get(**xla.CLIP))

    def add(stack: int, x: jax.Array, y: jax.Array) -> jax.Array:
        rows = xla.stack_rows(experts, experts.stacks[stack], places[stack], table.pages, ranks, tiles.slot, max_rank)
        return xla.add_tiles(
            x, y, pool, experts.stacks[stack], experts, rows, tiles, tiles.num_tiles, min(TILE_ROWS, x.shape[0])
        )

    return partial(add, 0), partial(add, 1)


def _row_tiles(table: ExpertTable, chosen: jax.Array, order: jax.Array) -> tuple[LoraTiles, jax.Array]:
    """Cuts the rows of each expert of each adapter into tiles of at most `TILE_ROWS`. Returns them with their experts,
    int32 `[NT]`. An adapter's tokens follow one another in a step, so its rows do so for each expert."""
    (slots, experts, _), count = table.ranks.shape, order.size
    expert, token = chosen.reshape(-1)[order], order // chosen.shape[1]
    slot = table.row_slot[token]
    has_lora = table.ranks.at[slot, expert].get(**xla.CLIP).max(-1) > 0
    live = (token < table.lora_rows) & (expert < experts) & has_lora
    owner = jnp.where(live, slot * experts + expert, -1)
    row = jnp.arange(count)
    begins = jnp.concatenate([jnp.ones(1, bool), owner[1:] != owner[:-1]])
    within = row - lax.cummax(jnp.where(begins, row, 0))
    begins = live & (within % TILE_ROWS == 0)
    most = min(count, slots * experts + count // TILE_ROWS)
    first_row = jnp.flatnonzero(begins, size=most, fill_value=0)
    rows = jnp.zeros(most, jnp.int32).at[jnp.where(live, jnp.cumsum(begins) - 1, most)].add(1, mode="drop")
    num_tiles, all_rows = begins.sum(), jnp.int32(count)
    tiles = LoraTiles(slot[first_row], first_row, rows, slot, num_tiles, num_tiles, all_rows, all_rows)
    return tiles, expert[first_row]
