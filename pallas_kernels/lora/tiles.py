"""The inputs of a step's LoRA products: the adapters' pages, and the row tiles that use them."""

from __future__ import annotations

from dataclasses import dataclass

import jax


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class AdapterTable:
    """The pages of each adapter slot, on the device. Changes only when an adapter is loaded.

    Attributes:
      pages: int32 `[slots, max_pages]`, pool page ids in tile order; 0 (the dummy page) past the adapter's end.
      ranks: int32 `[slots, 10]`, true rank of each projection (`layout.PROJECTIONS`), 0 without LoRA; then the extras
        (`layout.VECTORS`, `layout.ENDS`). The products of projections also take `[slots, 7]`.
      experts: int32 `[slots, E, 3]`, true rank of each of an expert's projections (`layout.EXPERT_PROJECTIONS`); None
        if LoRA on experts is not served.
    """

    pages: jax.Array
    ranks: jax.Array
    experts: jax.Array | None = None


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class LoraTiles:
    """The LoRA work of one step: an exact list of row tiles, shared by all layers, stacks and backends.

    Rows of one adapter are contiguous. Adapters with many rows (*dense*) come first, in rows `0 .. dense_rows` and
    tiles `0 .. num_dense`; then the other adapters; rows from `lora_rows` on have no adapter. In each part, high ranks
    come first.

    Attributes:
      slot, first_row, rows: int32 `[NT]`, valid up to `num_tiles`; `rows` is at least 1, and at most the
        program's tile height.
      row_slot: int32 `[T]`, adapter slot of each row (any valid slot for a row without an adapter).
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
