"""Attention over the unified pool: decode rows and chunked prefill of many sequences in one call."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp

from pallas_kernels import devices
from pallas_kernels.paged_attention import plan, xla
from pallas_kernels.paged_attention.plan import AttentionShape

Implementation = Literal["xla", "triton", "mosaic_gpu"]
IMPLEMENTATIONS = get_args(Implementation)


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


class PagedAttention:
    """The attention of one step: made once, before the layers, then called for each layer.

    page_size, dtype: the pool's. decode: every sequence has exactly one row: there is no prefill tile (static).
    tile_rows: most rows of a prefill tile (static). window: how many keys a query sees, its own included (None: all).
    implementation: None for the plan table's choice on the current trace's device; "xla" on a CPU, for a float32 pool,
    and, with a warning, where that choice does not serve the shape. interpret: run GPU kernels on the CPU by their
    interpreters.

    Raises NotImplementedError where an implementation named by the caller does not serve the shape or the dtype.
    """

    def __init__(
        self,
        tiles: AttentionTiles,
        *,
        num_heads: int,
        num_kv_heads: int,
        head_dim: int,
        page_size: int,
        dtype: Any,
        decode: bool,
        tile_rows: int,
        window: int | None = None,
        implementation: Implementation | None = None,
        interpret: bool = False,
    ) -> None:
        num_seqs, max_pages = tiles.page_table.shape
        rows = num_seqs if decode else (tiles.prefill_seq.shape[0] - num_seqs) * tile_rows
        self._shape = AttentionShape(
            num_heads, num_kv_heads, head_dim, page_size, jnp.dtype(dtype), num_seqs, max_pages, rows, decode, window
        )
        reference = devices.target() is None or self._shape.dtype == jnp.float32
        name = implementation or ("xla" if reference else plan.backend(self._shape))
        try:
            self._attend = _made(name, tiles, self._shape, tile_rows, interpret)
        except NotImplementedError as reason:
            if implementation is not None:
                raise
            warnings.warn(f"attention by the XLA reference, which is slow on a GPU: {reason}", stacklevel=2)
            self._attend = _made("xla", tiles, self._shape, tile_rows, interpret)

    def __call__(self, q: jax.Array, pool: jax.Array) -> jax.Array:
        """Causal grouped-query attention of every row over its own sequence's pages.

        Args:
          q: `[T, H, head_dim]`, rotated, not scaled.
          pool: one layer's pool `[num_pages, 2, page_size, W]` with `W = num_kv_heads * head_dim`.

        Returns:
          `[T, H, head_dim]` in q's dtype; zeros in rows that belong to no sequence. Softmax in float32.
        """
        shape = self._shape
        if q.shape[1:] != (shape.num_heads, shape.head_dim) or pool.shape[1:] != (2, shape.page_size, shape.width):
            raise ValueError(f"PagedAttention: q {q.shape} and pool {pool.shape} do not match {shape}")
        return self._attend(q, pool)


def _made(
    name: str, tiles: AttentionTiles, shape: AttentionShape, tile_rows: int, interpret: bool
) -> Callable[[jax.Array, jax.Array], jax.Array]:
    """The implementation `name` for one step: `(q, pool) -> out`. Backends are imported where they are used."""
    if name == "xla":
        return xla.Attention(tiles, shape, tile_rows)
    if name == "triton":
        from pallas_kernels.paged_attention import triton

        return triton.Attention(tiles, shape, interpret=interpret)
    if name == "mosaic_gpu":
        from pallas_kernels.paged_attention import mosaic_gpu

        return mosaic_gpu.Attention(tiles, shape, tile_rows, interpret=interpret)
    available = ", ".join(map(repr, IMPLEMENTATIONS))
    raise NotImplementedError(f"paged_attention: no implementation named {name!r}; available: {available}")


def paged_attention(
    q: jax.Array,
    pool: jax.Array,
    tiles: AttentionTiles,
    *,
    num_kv_heads: int,
    decode: bool,
    tile_rows: int,
    window: int | None = None,
    implementation: Implementation | None = None,
    interpret: bool = False,
) -> jax.Array:
    """One layer's attention on its own: `PagedAttention` made and called."""
    attend = PagedAttention(
        tiles,
        num_heads=q.shape[1],
        num_kv_heads=num_kv_heads,
        head_dim=q.shape[2],
        page_size=pool.shape[2],
        dtype=pool.dtype,
        decode=decode,
        tile_rows=tile_rows,
        window=window,
        implementation=implementation,
        interpret=interpret,
    )
    return attend(q, pool)
