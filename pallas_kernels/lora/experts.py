"""LoRA on experts: each expert of each adapter slot is an adapter of its own, of the rows that the router sends to it.

The kernels and the XLA reference are those of the other products.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels.experts.xla import Add
from pallas_kernels.lora import xla
from pallas_kernels.lora.api import Implementation, LoraOptions, backend, kernel_work, lora_expand, lora_shrink
from pallas_kernels.lora.layout import EXPERT_PROJECTIONS, PROJECTIONS, RANKS, LoraLayout
from pallas_kernels.lora.plan import tile_rows
from pallas_kernels.lora.tiles import AdapterTable, LoraTiles

TILE_ROWS = 16
"""Most rows of one expert of one adapter in one product of the XLA reference."""


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
      options: of the products (static).
    """

    pages: jax.Array
    ranks: jax.Array
    first_tile: jax.Array
    row_slot: jax.Array
    lora_rows: jax.Array
    options: LoraOptions = field(metadata={"static": True})


def prepare(
    layout: LoraLayout,
    table: AdapterTable,
    tiles: LoraTiles,
    *,
    dtype: Any,
    decode: bool,
    max_rank: int,
    implementation: Implementation | None = None,
    interpret: bool = False,
) -> ExpertTable:
    """Locates every expert of every slot.

    Args:
      dtype, decode, max_rank, implementation, interpret: as of `LoraProduct`; "bmm" does not serve experts.
    """
    assert table.experts is not None
    first_tile = layout.expert_tiles(table.ranks[:, :RANKS], table.experts)[0]
    name = backend(layout.expert, dtype, implementation=implementation)
    height = TILE_ROWS if name == "xla" else tile_rows(backend=name, decode=decode)
    options = LoraOptions(decode, height, max_rank, name, interpret)
    return ExpertTable(table.pages, table.experts, first_tile, tiles.row_slot, tiles.lora_rows, options)


def products(
    table: ExpertTable, chosen: jax.Array, order: jax.Array, pool: jax.Array, layout: LoraLayout
) -> tuple[Add, Add]:
    """Returns the LoRA products of gate | up and of down in one layer.

    Args:
      chosen: int32 `[T, k]`, each token's experts; E is none.
      order: int32 `[T k]`, the rows (`token * k + j`) by expert, and in ascending order for each expert; any numbers
        in the place of the rows without an expert, which come last.
      pool: the layer's pool `[num_pages, 2, page_size, W]`.

    Returns:
      Functions of rows in this order. Rows without LoRA on their expert keep the bits of y.
    """
    tiles, expert = _row_tiles(table, chosen, order)
    experts = layout.expert
    others = len(PROJECTIONS) - len(EXPERT_PROJECTIONS)
    ranks = jnp.pad(table.ranks.at[tiles.slot, expert].get(**xla.CLIP), ((0, 0), (others, 0)))  # [NT, 7]
    first_tile, options = table.first_tile.at[tiles.slot, expert].get(**xla.CLIP), table.options
    if options.implementation != "xla":
        work = kernel_work(experts, ranks, tiles, options, first_tile)

        def add_by_kernels(stack: int, x: jax.Array, y: jax.Array) -> jax.Array:
            h = lora_shrink(x, pool, table.pages, work, experts, experts.stacks[stack], options)
            return lora_expand(h, y, pool, table.pages, work, experts, experts.stacks[stack], options)

        return partial(add_by_kernels, 0), partial(add_by_kernels, 1)
    places, _ = experts.stack_tiles(ranks, first_tile)

    def add(stack: int, x: jax.Array, y: jax.Array) -> jax.Array:
        rows = xla.stack_rows(
            experts, experts.stacks[stack], places[stack], table.pages, ranks, tiles.slot, options.max_rank
        )
        return xla.add_tiles(
            x, y, pool, experts.stacks[stack], experts, rows, tiles, tiles.num_tiles, min(options.tile_rows, x.shape[0])
        )

    return partial(add, 0), partial(add, 1)


def _row_tiles(table: ExpertTable, chosen: jax.Array, order: jax.Array) -> tuple[LoraTiles, jax.Array]:
    """Cuts the rows of each expert of each adapter into tiles of at most `tile_rows`. Returns them with their experts,
    int32 `[NT]`. An adapter's tokens follow one another in a step, so its rows do so for each expert."""
    (slots, experts, _), count, height = table.ranks.shape, order.size, table.options.tile_rows
    row, token = jnp.arange(count), order // chosen.shape[1]
    expert = jnp.where(row < (chosen < experts).sum(), chosen.reshape(-1).at[order].get(**xla.CLIP), experts)
    slot = table.row_slot.at[token].get(**xla.CLIP)
    has_lora = table.ranks.at[slot, expert].get(**xla.CLIP).max(-1) > 0
    live = (token < table.lora_rows) & (expert < experts) & has_lora
    owner = jnp.where(live, slot * experts + expert, -1)
    begins = jnp.concatenate([jnp.ones(1, bool), owner[1:] != owner[:-1]])
    within = row - lax.cummax(jnp.where(begins, row, 0))
    begins = live & (within % height == 0)
    most = min(count, slots * experts + count // height)
    first_row = jnp.flatnonzero(begins, size=most, fill_value=0)
    rows = jnp.zeros(most, jnp.int32).at[jnp.where(live, jnp.cumsum(begins) - 1, most)].add(1, mode="drop")
    num_tiles, all_rows = begins.sum(), jnp.int32(count)
    tiles = LoraTiles(slot[first_row], first_row, rows, slot, num_tiles, num_tiles, all_rows, all_rows)
    return tiles, expert[first_row]
