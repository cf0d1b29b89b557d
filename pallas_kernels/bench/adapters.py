"""Resident adapters in pools whose contents do not matter, and the rows of a step spread over some of them."""

from __future__ import annotations

from dataclasses import dataclass

import jax.numpy as jnp
import numpy as np

from pallas_kernels.bench.pools import random_pages
from pallas_kernels.lora import AdapterTable, LoraLayout, LoraTiles
from pallas_kernels.lora.layout import ceil_div

Ranks = int | str
"""Rank of every projection; "mixed": adapters of `MIXED_RANKS` in turn; "ragged": any rank for any projection."""

MIXED_RANKS = (8, 16, 32, 64)


@dataclass(frozen=True, eq=False)
class Adapters:
    """ranks: int32 `[slots, 7]`. pages: int32 `[slots, max_pages]`."""

    ranks: np.ndarray
    pages: np.ndarray

    def table(self) -> AdapterTable:
        return AdapterTable(jnp.asarray(self.pages), jnp.asarray(self.ranks))

    def by_rank(self, slots: np.ndarray) -> np.ndarray:
        """High ranks first, as a step orders its adapters."""
        return slots[np.argsort(-self.ranks[slots].sum(1), kind="stable")]


def resident(
    layout: LoraLayout, ranks: Ranks, *, slots: int, max_rank: int, pool_pages: int, rng: np.random.Generator
) -> Adapters:
    """Adapters in all slots, each on pages of its own, in random order, as far as the pool has them."""
    match ranks:
        case "mixed":
            of_slot = np.resize([min(rank, max_rank) for rank in MIXED_RANKS], slots)
            table = np.repeat(of_slot[:, None], 7, axis=1)
        case "ragged":
            table = rng.integers(0, max_rank + 1, (slots, 7)) * (rng.random((slots, 7)) < 0.8)
        case int():
            table = np.full((slots, 7), ranks)
        case _:
            raise ValueError(f'ranks: {ranks!r}; an integer, "mixed" or "ragged"')
    counts = layout.num_pages(table)
    ids = random_pages(int(counts.sum()), pool_pages, rng)
    pages = np.zeros((slots, max_pages(layout, max_rank)), np.int32)
    for slot, (count, end) in enumerate(zip(counts, np.cumsum(counts), strict=True)):
        pages[slot, :count] = ids[end - count : end]
    return Adapters(table.astype(np.int32), pages)


def max_pages(layout: LoraLayout, max_rank: int) -> int:
    """Pages of the largest adapter: columns of the adapter table."""
    return int(layout.num_pages(np.full(7, max_rank)))


def spread(rows: int, adapters: int) -> np.ndarray:
    """`rows` over `adapters`, as evenly as they go: int `[adapters]`."""
    return rows // adapters + (np.arange(adapters) < rows % adapters)


def num_tiles(rows: int, tile_rows: int, slots: int, seqs: int) -> int:
    """Entries of a step's tile list."""
    return ceil_div(rows, tile_rows) + min(slots, seqs)


def lora_tiles(
    slots: np.ndarray, counts: np.ndarray, *, rows: int, tile_rows: int, entries: int, decode: bool
) -> LoraTiles:
    """The tile list of a step of `rows` rows whose first belong to `slots [n]`, `counts [n]` each; the rest has no
    adapter. In a step that is not decode all adapters count as dense."""
    first, tiles = np.cumsum(counts) - counts, []
    for slot, start, count in zip(slots.tolist(), first.tolist(), counts.tolist(), strict=True):
        tiles += [(slot, start + row, min(tile_rows, count - row)) for row in range(0, count, tile_rows)]
    table = np.zeros((entries, 3), np.int32)
    table[: len(tiles)] = np.array(tiles, np.int32).reshape(-1, 3)
    lora_rows = int(counts.sum())
    row_slot = np.zeros(rows, np.int32)
    row_slot[:lora_rows] = np.repeat(slots, counts)
    dense = (0, 0) if decode else (len(tiles), lora_rows)
    scalars = (jnp.int32(n) for n in (len(tiles), *dense, lora_rows))
    slot, first_row, tile_counts = (jnp.asarray(np.array(column)) for column in table.T)
    return LoraTiles(slot, first_row, tile_counts, jnp.asarray(row_slot), *scalars)
