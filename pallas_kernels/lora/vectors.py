"""The vectors of adapters (a scale and a bias for every output column), applied to the base product of a stack.

They serve what is more than LoRA on a projection: DoRA, biases of B, trained biases of the base model. All backends use
these XLA operations, before the LoRA product.
"""

from __future__ import annotations

from dataclasses import dataclass

import jax
import jax.numpy as jnp

from pallas_kernels.kv_format import weights_at
from pallas_kernels.lora.layout import VECTORS, LoraLayout, Stack
from pallas_kernels.lora.tiles import AdapterTable, LoraTiles
from pallas_kernels.lora.xla import CLIP, join_outputs


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class VectorRows:
    """Addresses of the vectors of each row's adapter, in the pool as rows `[num_pages * 2 * page_size, W]`.

    Attributes:
      row: int32 `[T, vector_rows]`; 0 for a row without vectors.
      live: bool `[T]`, whether the row's adapter has vectors.
    """

    row: jax.Array
    live: jax.Array


def prepare(layout: LoraLayout, table: AdapterTable, tiles: LoraTiles) -> VectorRows:
    """Locates the vectors of a step's rows, once for all layers."""
    ranks, size = table.ranks[tiles.row_slot], layout.page_size  # [T, 10]
    live = (jnp.arange(tiles.row_slot.size) < tiles.lora_rows) & (ranks[:, VECTORS] > 0)
    row = jnp.arange(layout.vector_rows)
    tile = layout.stack_tiles(ranks)[1][:, None] + row // size  # [T, vector_rows]
    page = table.pages.at[tiles.row_slot[:, None], tile // 2].get(**CLIP)
    return VectorRows(jnp.where(live[:, None], (2 * page + tile % 2) * size + row % size, 0), live)


def apply(y: jax.Array, pool: jax.Array, stack: Stack, layout: LoraLayout, rows: VectorRows) -> jax.Array:
    """Returns `y (1 + scale) + bias` for rows with vectors, and `y` for the others.

    Args:
      y: the base product of a stack, with the base model's bias; a shard's columns `[T, stack.d_out]`, or a partial sum
        `[T, stack.of_base.d_out]`, to which one shard alone adds biases.
      pool: one layer's pool `[num_pages, 2, page_size, W]`.
    """
    base = stack.of_base
    flat, count = pool.reshape(-1, layout.width), layout.output_chunks(base)

    def columns(first: int) -> jax.Array:  # float32 [T, d_out]
        chunks = weights_at(flat, rows.row[:, first : first + count], **CLIP)  # [T, chunks, W]
        return join_outputs(chunks, base, layout).astype(jnp.float32)

    first = layout.first_vector_row(stack)
    scale, bias = columns(first), columns(first + layout.vector_rows // 2)
    changed = y.astype(jnp.float32) * (1 + scale) + bias
    return jnp.where(rows.live[:, None], changed.astype(y.dtype), y)
