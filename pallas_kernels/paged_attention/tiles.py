"""The attention work of one step, as every backend takes it."""

from __future__ import annotations

from dataclasses import dataclass

import jax


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class AttentionTiles:
    """The attention work of one step, shared by all layers. The sequences' rows are contiguous from row 0, and the
    pool already has each sequence's keys, up to and including its own rows. A sequence without rows is padding.

    Attributes:
      page_table: int32 `[S, max_pages]`, each sequence's pages in order of position.
      first_row, length, context: int32 `[S]`, first row in the step, rows in the step, tokens before them.
      prefill_seq, prefill_row: int32 `[NT]`, tiles of sequences with more than one row: the sequence, and the tile's
        first row relative to the sequence's; valid up to `num_prefill`. `NT = ceil(T / tile_rows) + S`, 0 in a decode
        program.
      decode_seq: int32 `[S]`, sequences with one row, longest context first; valid up to `num_decode`.
      num_prefill, num_decode: int32 scalars.
    """

    page_table: jax.Array
    first_row: jax.Array
    length: jax.Array
    context: jax.Array
    prefill_seq: jax.Array
    prefill_row: jax.Array
    num_prefill: jax.Array
    decode_seq: jax.Array
    num_decode: jax.Array
