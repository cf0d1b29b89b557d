"""The exact work list of a step's attention: one item per block."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from pallas_kernels.lora.layout import ceil_div
from pallas_kernels.paged_attention.plan import AttentionShape
from pallas_kernels.paged_attention.tiles import AttentionTiles

CONSUMERS = 2
"""Warpgroups of 64 packed rows in a mixed block, whose registers are allotted for two."""


def block_rows(group: int) -> int:
    """Rows of a mixed block: a power of two that, times the group's heads, fills the consumers."""
    return 64 * CONSUMERS // (1 << (group - 1).bit_length())


def mixed_work(tiles: AttentionTiles, shape: AttentionShape) -> jax.Array:
    """Builds the exact work list of a step, shared by all layers.

    Returns:
      int32 `[N, 6]`; unused items are zeros: `(seq, block's first row, own rows from, to, position minus row, keys of
      the sequence)`.
    """
    rows = block_rows(shape.group)
    blocks = ceil_div(shape.max_rows, rows)
    total = jnp.max(tiles.first_row + tiles.length)
    # Rows after the last sequence form one more sequence without keys, which gets zeros.
    first_row = jnp.append(tiles.first_row, total)
    last_row = first_row + jnp.append(tiles.length, blocks * rows - total)
    keys = jnp.append(tiles.context + tiles.length, 0)
    shift = jnp.append(tiles.context, 0) - first_row

    count = jnp.where(last_row > first_row, (last_row - 1) // rows - first_row // rows + 1, 0)
    last = jnp.cumsum(count)
    item = jnp.arange(blocks + shape.num_seqs)
    seq = jnp.minimum(jnp.searchsorted(last, item, side="right", method="compare_all"), shape.num_seqs)
    block = (first_row[seq] // rows + item - (last - count)[seq]) * rows
    own = jnp.maximum(block, first_row[seq]), jnp.minimum(block + rows, last_row[seq])
    fields = (jnp.minimum(seq, shape.num_seqs - 1), block, *own, shift[seq], keys[seq])
    table = jnp.stack(fields, 1).astype(jnp.int32)
    items = jnp.where(item[:, None] < last[-1], table, 0)
    longest_first = jnp.argsort(-jnp.minimum(items[:, 3] + items[:, 4], items[:, 5]))
    return items[longest_first]
