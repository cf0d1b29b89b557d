"""The gathered LoRA product in two halves, for shards of a base model that exchange `x A` between them."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels.lora import xla
from pallas_kernels.lora.api import (
    AdapterTable,
    Implementation,
    LoraOptions,
    LoraTiles,
    StepWork,
    lora_expand,
    lora_shrink,
    resolve,
)
from pallas_kernels.lora.layout import LoraLayout, Stack
from pallas_kernels.lora.plan import MIN_BLOCK
from pallas_kernels.lora.work import stack_work


@jax.tree_util.register_pytree_node_class
class LoraHalves(StepWork):
    """`shrink` and `expand` of one step: made once, before the layers, then called for each layer and stack. The
    arguments are `LoraProduct`'s. What lies between the halves is of one form in every backend: `[T, projections,
    ranks]`, where rows without an adapter and ranks that an adapter lacks may hold anything.

    Raises:
      NotImplementedError: the implementation does not take this shape or dtype, or keeps ranks in a form of its own.
    """

    ARRAYS = ("_tiles", "_pages", "_rows", "_a_work", "_b_work")
    STATIC = ("_layout", "_dtype", "_tile_rows", "_max_rank", "_options")

    def __init__(
        self,
        layout: LoraLayout,
        table: AdapterTable,
        tiles: LoraTiles,
        *,
        dtype: Any,
        decode: bool,
        tile_rows: int,
        max_rank: int,
        implementation: Implementation | None = None,
        interpret: bool = False,
    ) -> None:
        backend = resolve(implementation, dtype)
        if backend == "mosaic_gpu":
            raise NotImplementedError(
                "LoraHalves: 'mosaic_gpu' keeps the ranks of x A in an order of its own; available: 'xla', 'triton'"
            )
        if implementation is None and layout.width % MIN_BLOCK:
            backend = "xla"
        self._layout = layout
        self._tiles = tiles
        self._pages = table.pages
        self._dtype = dtype
        self._tile_rows = tile_rows
        self._max_rank = max_rank
        self._options = LoraOptions(decode, tile_rows, max_rank, backend, interpret)
        self._rows: tuple[xla.StackRows, ...] = ()
        self._a_work: tuple[jax.Array, ...] = ()
        self._b_work: tuple[jax.Array, ...] = ()
        if backend == "xla":
            self._rows = xla.prepare(layout, table.pages, table.ranks, tiles.slot, tiles.num_tiles, max_rank)
        else:
            work = (layout, table.ranks, tiles.slot, tiles.first_row, tiles.rows, tiles.num_tiles)
            self._a_work, self._b_work = stack_work(*work, of_a=True), stack_work(*work)

    def shrink(self, x: jax.Array, pool: jax.Array, stack: Stack) -> jax.Array:
        """`x A` of every row with an adapter: `[T, d_in]` to `[T, projections, ceil(max_rank / stack.rank_shards)]` in
        the pool's dtype; products accumulate in float32."""
        number = self._layout.stacks.index(stack)
        ranks = stack.a_ranks(self._max_rank)
        if self._options.implementation == "xla":
            tiles = self._tiles
            h = xla.shrink_tiles(
                x, pool, stack, self._layout, self._rows[number], tiles.first_row, tiles.rows, tiles.num_tiles,
                self._tile_rows,
            )  # fmt: skip
        else:
            options = replace(self._options, max_rank=ranks)
            slices = lora_shrink(x, pool, self._pages, self._a_work[number], self._layout, stack, options)
            h = slices.sum(0).reshape(x.shape[0], len(stack.projections), -1)
        return h[:, :, :ranks].astype(self._dtype)

    def expand(self, h: jax.Array, y: jax.Array, pool: jax.Array, stack: Stack) -> jax.Array:
        """`y + h B`, h `[T, projections, ranks]` (at least `max_rank` of them), y `[T, stack.d_out]`; rows without an
        adapter are y's to the bit."""
        number = self._layout.stacks.index(stack)
        if self._options.implementation == "xla":
            rows, tiles = self._rows[number], self._tiles
            h = _widen(h, rows.b_row.shape[0] * xla.GROUP)
            return xla.expand_tiles(
                h, y, pool, stack, self._layout, rows, tiles.first_row, tiles.rows, tiles.num_tiles, self._tile_rows
            )
        h = _widen(h, self._options.rank_columns).reshape(1, h.shape[0], -1)
        return lora_expand(h, y, pool, self._pages, self._b_work[number], self._layout, stack, self._options)


def _widen(h: jax.Array, ranks: int) -> jax.Array:
    """float32 `[T, projections, ranks]`, cut or padded with zeros."""
    h = h[:, :, :ranks].astype(jnp.float32)
    return jnp.pad(h, ((0, 0), (0, 0), (0, ranks - h.shape[2])))
