"""Attention over the unified pool: decode rows and chunked prefill of many sequences in one call."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import jax

from pallas_kernels.paged_attention import xla

Implementation = Literal["xla"]


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class AttentionTiles:
    """The attention work of one step, shared by all layers. Row t of the step belongs to one sequence of the batch;
    a sequence's rows are contiguous and its keys, up to and including its own rows, already lie in the pool.

    page_table: int32 `[S, max_pages]`, each sequence's pages in order of position.
    first_row, length, context: int32 `[S]`, first row in the step, rows in the step, tokens before them.
    prefill_seq, prefill_row: int32 `[NT]`, tiles of sequences with more than one row: the sequence, and the tile's
      first row counted from the sequence's first; valid up to `num_prefill` (a scalar).
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


def paged_attention(
    q: jax.Array,
    pool: jax.Array,
    tiles: AttentionTiles,
    *,
    num_kv_heads: int,
    decode: bool,
    tile_rows: int,
    implementation: Implementation = "xla",
) -> jax.Array:
    """Causal grouped-query attention of every row over its own sequence's pages.

    Args:
      q: `[T, H, head_dim]`, rotated, not scaled.
      pool: one layer's pool `[num_pages, 2, page_size, W]` with `W = num_kv_heads * head_dim`.
      decode: every sequence has exactly one row: there is no prefill tile (static).
      tile_rows: most rows of a prefill tile (static).

    Returns:
      `[T, H, head_dim]` in q's dtype; zeros in rows that belong to no sequence. Softmax in float32.
    """
    if implementation != "xla":
        raise NotImplementedError(f"paged_attention: no implementation named {implementation!r}; available: 'xla'")
    return xla.paged_attention(q, pool, tiles, num_kv_heads=num_kv_heads, decode=decode, tile_rows=tile_rows)
