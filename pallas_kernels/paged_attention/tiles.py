"""The attention work of one step, as every backend takes it."""

from __future__ import annotations

from dataclasses import dataclass

import jax


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class AttentionTiles:
    """The attention work of one step, shared by all layers. Row t of the step belongs to one sequence of the batch;
    the sequences' rows lie one after another from row 0, and a sequence's keys, up to and including its own rows,
    already lie in the pool. A sequence without rows is padding.

    page_table: int32 `[S, max_pages]`, each sequence's pages in order of position.
    first_row, length, context: int32 `[S]`, first row in the step, rows in the step, tokens before them.
    prefill_seq, prefill_row: int32 `[NT]`, tiles of sequences with more than one row: the sequence, and the tile's
      first row counted from the sequence's first; valid up to `num_prefill` (a scalar). `NT = ceil(T / tile_rows) + S`,
      or 0 in a decode program.
    decode_seq: int32 `[S]`, sequences with one row, longest context first; valid up to `num_decode` (a scalar).
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
