"""Resident adapters on random pages, and the rows of a step spread over some of them."""

from __future__ import annotations

from dataclasses import dataclass

import jax.numpy as jnp
import numpy as np

from pallas_kernels.bench.pools import random_pages
from pallas_kernels.lora import AdapterTable, LoraLayout, LoraTiles

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
    """Returns adapters in all slots, on random pages. Adapters share pages only if the pool has too few."""
    if ranks == "mixed":
        table = np.resize([min(rank, max_rank) for rank in MIXED_RANKS], slots)[:, None].repeat(7, axis=1)
    elif ranks == "ragged":
        table = rng.integers(0, max_rank + 1, (slots, 7)) * (rng.random((slots, 7)) < 0.8)
    elif isinstance(ranks, int):
        table = np.full((slots, 7), ranks)
    else:
        raise ValueError(f'ranks={ranks!r}: must be an integer, "mixed" or "ragged"')
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
    """Splits `rows` over `adapters` as evenly as possible: int `[adapters]`."""
    return rows // adapters + (np.arange(adapters) < rows % adapters)


def lora_tiles(
    slots: np.ndarray, counts: np.ndarray, *, rows: int, tile_rows: int, entries: int, decode: bool
) -> LoraTiles:
    """Returns the tile list of a step of `rows` rows. `slots [n]` have `counts [n]` rows each, from row 0 on; the other
    rows have no adapter. Unless `decode`, all adapters are dense."""
    first, tiles = np.cumsum(counts) - counts, []
    for slot, start, count in zip(slots.tolist(), first.tolist(), counts.tolist(), strict=True):
        tiles += [(slot, start + row, min(tile_rows, count - row)) for row in range(0, count, tile_rows)]
    table = np.zeros((entries, 3), np.int32)
    table[: len(tiles)] = np.array(tiles, np.int32).reshape(-1, 3)
    lora_rows = int(counts.sum())
    row_slot = np.zeros(rows, np.int32)
    row_slot[:lora_rows] = np.repeat(slots, counts)
    scalars = (jnp.int32(n) for n in (len(tiles), *((0, 0) if decode else (len(tiles), lora_rows)), lora_rows))
    slot, first_row, tile_counts = (jnp.asarray(np.array(column)) for column in table.T)
    return LoraTiles(slot, first_row, tile_counts, jnp.asarray(row_slot), *scalars)
