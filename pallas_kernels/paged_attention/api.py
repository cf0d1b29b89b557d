"""Attention over the unified pool: decode rows and chunked prefill of many sequences in one call."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp

from pallas_kernels import fallback
from pallas_kernels.kv_format import KvDtype, LayerPool, kv_dtype_of, page_tokens, pages_of
from pallas_kernels.paged_attention import plan, xla
from pallas_kernels.paged_attention.plan import AttentionShape
from pallas_kernels.paged_attention.tiles import AttentionTiles

Implementation = Literal["xla", "triton", "mosaic_gpu"]
IMPLEMENTATIONS = get_args(Implementation)


class PagedAttention:
    """The attention of one step: built once, before the layers, then called for each layer.

    Args:
      page_size: tokens of a page.
      dtype: of the products, and of the pool's keys and values unless `kv_dtype` is given.
      decode: every sequence has exactly one row, so there are no prefill tiles (static).
      tile_rows: most rows of a prefill tile (static).
      window: number of newest keys that a query sees, its own included; None: all.
      score_cap: a scaled score s becomes `score_cap * tanh(s / score_cap)`; None: it stays s.
      kv_dtype: format of keys and values of one byte (`kv_format`); None: `dtype`.
      implementation: None: the plan table's for the current trace's device; "xla" on a CPU, for float32, and, with a
        warning, for shapes that the planned one does not serve.
      interpret: run GPU kernels on the CPU by their interpreters.

    Raises:
      NotImplementedError: an implementation named by the caller does not serve the shape or the dtype.
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
        score_cap: float | None = None,
        kv_dtype: KvDtype | None = None,
        implementation: Implementation | None = None,
        interpret: bool = False,
    ) -> None:
        num_seqs, max_pages = tiles.page_table.shape
        rows = num_seqs if decode else (tiles.prefill_seq.shape[0] - num_seqs) * tile_rows
        self._shape = AttentionShape(
            num_heads, num_kv_heads, head_dim, page_size, jnp.dtype(dtype), num_seqs, max_pages, rows, decode, window,
            score_cap, kv_dtype,
        )  # fmt: skip
        self._attend = fallback.choose(
            "attention",
            implementation,
            dtype,
            partial(plan.backend, self._shape),
            partial(_made, tiles, self._shape, tile_rows, interpret),
        )

    def __call__(self, q: jax.Array, pool: LayerPool) -> jax.Array:
        """Computes causal grouped-query attention of every row over its own sequence's pages.

        Args:
          q: `[T, H, head_dim]`, rotated, not scaled.
          pool: one layer's pool `[num_pages, 2, page_size, W]` with `W = num_kv_heads * head_dim`; with `kv_dtype` as
            in `kv_format`.

        Returns:
          `[T, H, head_dim]` in q's dtype; zeros in rows without a sequence. Softmax in float32.
        """
        shape, pages = self._shape, pages_of(pool)
        found = *q.shape[1:], page_tokens(pages), pages.shape[3], kv_dtype_of(pool)
        if found != (shape.num_heads, shape.head_dim, shape.page_size, shape.width, shape.kv_dtype):
            raise ValueError(f"PagedAttention: q {q.shape} and pool {pages.shape} do not match {shape}")
        return self._attend(q, pool)


def _made(
    tiles: AttentionTiles, shape: AttentionShape, tile_rows: int, interpret: bool, name: str
) -> Callable[[jax.Array, LayerPool], jax.Array]:
    """Returns the implementation `name` for one step: `(q, pool) -> out`. Backends are imported at use."""
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
    pool: LayerPool,
    tiles: AttentionTiles,
    *,
    num_kv_heads: int,
    decode: bool,
    tile_rows: int,
    window: int | None = None,
    score_cap: float | None = None,
    implementation: Implementation | None = None,
    interpret: bool = False,
) -> jax.Array:
    """Computes one layer's attention by a `PagedAttention` built for this call."""
    pages, kv_dtype = pages_of(pool), kv_dtype_of(pool)
    attend = PagedAttention(
        tiles,
        num_heads=q.shape[1],
        num_kv_heads=num_kv_heads,
        head_dim=q.shape[2],
        page_size=page_tokens(pages),
        dtype=q.dtype if kv_dtype else pages.dtype,
        decode=decode,
        tile_rows=tile_rows,
        window=window,
        score_cap=score_cap,
        kv_dtype=kv_dtype,
        implementation=implementation,
        interpret=interpret,
    )
    return attend(q, pool)
