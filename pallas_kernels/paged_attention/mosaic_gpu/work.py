"""The exact work list of a step's attention: one item per block."""

from __future__ import annotations

from dataclasses import dataclass

import jax
import jax.numpy as jnp

from pallas_kernels.lora.layout import ceil_div
from pallas_kernels.paged_attention.plan import AttentionShape, MosaicGpuPlan
from pallas_kernels.paged_attention.tiles import AttentionTiles

CONSUMERS = 2
"""Warpgroups of 64 packed rows in a mixed block, whose registers are allotted for two."""


def block_rows(group: int) -> int:
    """Rows of a mixed block: a power of two that, times the group's heads, fills the consumers."""
    return 64 * CONSUMERS // (1 << (group - 1).bit_length())


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class MosaicWork:
    """The exact work list of a step, shared by all layers.

    Attributes:
      items: int32 `[N, 6]`; unused items are zeros. Decode: `(seq, row, first key seen, begin, end, 0)`: keys `begin`
        to `end` of a sequence, for its row. Mixed: `(seq, block's first row, own rows from, to, position minus row,
        keys of the sequence)`.
      row_items: int32 `[T, 2]`, of a decode step: each row's first item, and its number of items.
    """

    items: jax.Array
    row_items: jax.Array


def decode_work(tiles: AttentionTiles, shape: AttentionShape, plan: MosaicGpuPlan) -> MosaicWork:
    """Builds the work list of a decode step in plain XLA."""
    bound = shape.num_seqs + ceil_div(plan.programs, shape.num_kv_heads)
    live = jnp.arange(shape.num_seqs) < tiles.num_decode
    tokens = jnp.where(live, tiles.context[tiles.decode_seq] + 1, 0)
    seen = jnp.maximum(tokens - (shape.window or shape.max_tokens), 0)
    begin = seen // plan.block_n * plan.block_n
    doublings = (ceil_div(shape.max_tokens, plan.min_chunk) - 1).bit_length()
    chunks = plan.min_chunk << jnp.arange(doublings + 1)
    fits = (-((begin - tokens) // chunks[:, None])).sum(1) <= bound  # the longest always does: one item per sequence
    chunk = chunks[jnp.argmax(fits)]

    count = -((begin - tokens) // chunk)
    last = jnp.cumsum(count)
    item = jnp.arange(bound)
    entry = jnp.minimum(jnp.searchsorted(last, item, side="right", method="compare_all"), shape.num_seqs - 1)
    first = begin[entry] + (item - (last - count)[entry]) * chunk
    seq = tiles.decode_seq[entry]
    end = jnp.minimum(first + chunk, tokens[entry])
    fields = (seq, tiles.first_row[seq], seen[entry], first, end, jnp.zeros_like(seq))
    row = jnp.where(live, tiles.first_row[tiles.decode_seq], shape.max_rows)
    row_items = jnp.zeros((shape.max_rows, 2), jnp.int32)
    row_items = row_items.at[row].set(jnp.stack([last - count, count], 1), mode="drop")
    return MosaicWork(_items(fields, last[-1]), row_items)


def mixed_work(tiles: AttentionTiles, shape: AttentionShape) -> MosaicWork:
    """Builds the work list of a step with prefill."""
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
    items = _items(fields, last[-1])
    longest_first = jnp.argsort(-jnp.minimum(items[:, 3] + items[:, 4], items[:, 5]))
    return MosaicWork(items[longest_first], jnp.zeros((0, 2), jnp.int32))


def _items(fields: tuple[jax.Array, ...], count: jax.Array) -> jax.Array:
    table = jnp.stack(fields, 1).astype(jnp.int32)
    return jnp.where(jnp.arange(table.shape[0])[:, None] < count, table, 0)
