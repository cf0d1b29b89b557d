"""The attention kernels' work table: one row per program, built once per step for all layers."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from pallas_kernels.lora.layout import ceil_div
from pallas_kernels.paged_attention.tiles import AttentionTiles

FIELDS = ("row", "rows", "seq", "begin", "end", "part", "parts", "num_rows")
"""Columns of a work table. `row`, `rows`: the item's rows of the step (0 rows: no work). `seq`: their sequence.
`begin`, `end`: positions `begin .. end - 1` of a prefill item's rows, or of a decode item's keys. `part`, `parts`: a
decode item's chunk among those of its sequence's context, which are consecutive in the table. `num_rows`, the same in
every row: rows of the step with a sequence."""


def prefill_items(tiles: AttentionTiles, rows: int, items: int) -> jax.Array:
    """Tiles of at most `rows` rows of sequences with several rows, most keys first: int32 `[items, FIELDS]`."""
    seq, index, live = _list(jnp.where(tiles.length > 1, ceil_div(tiles.length, rows), 0), items)
    own = jnp.where(live, jnp.minimum(tiles.length[seq] - index * rows, rows), 0)
    begin = jnp.where(live, tiles.context[seq] + index * rows, 0)
    table = _table(tiles, tiles.first_row[seq] + index * rows, own, seq, begin, begin + own, 0 * seq, 0 * seq)
    return table[jnp.argsort(-(begin + own), stable=True)]


def decode_items(
    tiles: AttentionTiles, items: int, min_chunk: int, multiple: int, max_tokens: int, window: int | None
) -> jax.Array:
    """Chunks of the contexts of sequences with one row, longest context first: int32 `[items, FIELDS]`.

    The longest chunk is the smallest `min_chunk * 2^n` tokens that gives at most `items` chunks. All chunks of a
    sequence but its last have one length, a multiple of `multiple` tokens.

    Args:
      items: at least S, so that one chunk per sequence always fits.
      max_tokens: bound of a sequence's tokens.
    """
    seq = tiles.decode_seq
    live = jnp.arange(seq.shape[0]) < tiles.num_decode
    end = jnp.where(live, tiles.context[seq] + 1, 0)
    begin = jnp.zeros_like(end) if window is None else jnp.maximum(end - window, 0)
    tokens = end - begin
    doublings = (ceil_div(max_tokens, min_chunk) - 1).bit_length()
    longest = min_chunk << jnp.arange(doublings + 1)
    fits = _ceil_div(tokens, longest[:, None]).sum(1) <= items
    parts = _ceil_div(tokens, longest[jnp.argmax(fits)])
    chunk = ceil_div(_ceil_div(tokens, jnp.maximum(parts, 1)), multiple) * multiple  # as even as blocks allow
    parts = _ceil_div(tokens, jnp.maximum(chunk, 1))

    entry, part, live = _list(parts, items)
    begin = begin[entry] + part * chunk[entry]
    end = jnp.minimum(begin + chunk[entry], end[entry])
    return _table(tiles, tiles.first_row[seq[entry]], live, seq[entry], begin, end, part, parts[entry])


def _ceil_div(a: jax.Array, b: jax.Array) -> jax.Array:
    return (a + b - 1) // b


def _list(counts: jax.Array, items: int) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Lists `counts[i]` items of every `i`: (i, number among those of i, whether the entry is used) of each."""
    ends = jnp.cumsum(counts)
    item = jnp.arange(items)
    owner = jnp.minimum((ends[None, :] <= item[:, None]).sum(1), counts.shape[0] - 1)
    return owner, item - (ends - counts)[owner], item < ends[-1]


def _table(tiles: AttentionTiles, *columns: jax.Array) -> jax.Array:
    num_rows = jnp.full(columns[0].shape, tiles.length.sum())
    return jnp.stack([*columns, num_rows], axis=1).astype(jnp.int32)
