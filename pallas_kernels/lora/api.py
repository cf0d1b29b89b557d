"""The gathered LoRA product over the unified pool (paper section 5.3: MBGMM and MBGMV)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import jax

from pallas_kernels.lora import xla
from pallas_kernels.lora.layout import LoraLayout, Stack

Implementation = Literal["xla"]


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class AdapterTable:
    """Which pages each adapter slot owns, on the device. Changed only when an adapter is loaded.

    pages: int32 `[slots, max_pages]`, pool page ids in tile order; 0 (the dummy page) past the adapter's end.
    ranks: int32 `[slots, 7]`, true rank of each projection (`layout.PROJECTIONS`); 0 where it has no LoRA.
    """

    pages: jax.Array
    ranks: jax.Array


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class LoraTiles:
    """The LoRA work of one step: an exact list of row tiles, shared by all layers, stacks and backends.

    Rows of one adapter are contiguous. Adapters with many rows (*dense*) come first, in rows `0 .. dense_rows` and
    tiles `0 .. num_dense`; then the others; rows from `lora_rows` on have none. In each part, high ranks come first.

    slot, first_row, rows: int32 `[NT]`, valid up to `num_tiles`; `rows` is at most the program's tile height.
    row_slot: int32 `[T]`, adapter slot of each row (any valid slot where the row has none).
    num_tiles, num_dense, dense_rows, lora_rows: int32 scalars.
    """

    slot: jax.Array
    first_row: jax.Array
    rows: jax.Array
    row_slot: jax.Array
    num_tiles: jax.Array
    num_dense: jax.Array
    dense_rows: jax.Array
    lora_rows: jax.Array


class LoraProduct:
    """The LoRA products of one step: made once, before the layers, then called for each layer and stack.

    decode: no adapter is dense: the step's rows are sequences' single tokens (static). tile_rows: height of the tiles.
    max_rank: bound of any projection's rank.
    """

    def __init__(
        self,
        layout: LoraLayout,
        table: AdapterTable,
        tiles: LoraTiles,
        *,
        decode: bool,
        tile_rows: int,
        max_rank: int,
        implementation: Implementation = "xla",
    ) -> None:
        if implementation != "xla":
            raise NotImplementedError(f"LoraProduct: no implementation named {implementation!r}; available: 'xla'")
        self._layout = layout
        self._tiles = tiles
        self._decode = decode
        self._tile_rows = tile_rows
        pages, ranks = table.pages, table.ranks
        self._rows = xla.prepare(layout, pages, ranks, tiles.row_slot, tiles.lora_rows, max_rank)
        self._dense = () if decode else xla.prepare(layout, pages, ranks, tiles.slot, tiles.num_dense, max_rank)

    def __call__(self, x: jax.Array, y: jax.Array, pool: jax.Array, stack: Stack) -> jax.Array:
        """Adds each row's `x A B` (B carries the scale) to the fused base product of a stack.

        Args:
          x: `[T, stack.d_in]`.
          y: `[T, stack.d_out]`.
          pool: one layer's pool `[num_pages, 2, page_size, W]`.

        Returns:
          `[T, stack.d_out]` in y's dtype; products accumulate in float32.
        """
        layout, tiles, number = self._layout, self._tiles, self._layout.stacks.index(stack)
        if not self._decode:
            dense = self._dense[number]
            y = xla.add_tiles(
                x, y, pool, stack, layout, dense, tiles.first_row, tiles.rows, tiles.num_dense, self._tile_rows
            )
        return xla.add_rows(x, y, pool, stack, layout, self._rows[number], tiles.dense_rows, tiles.lora_rows)
