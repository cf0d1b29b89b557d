"""The attention kernel's work table: one row per item, built once per step for all layers.

Each item is computed once for every key-value head. The kernel's programs, as many as reside on the device at once,
take pairs of an item and a head from the table until none is left.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels import devices
from pallas_kernels.lora.layout import ceil_div
from pallas_kernels.paged_attention.plan import AttentionShape, TritonPlan
from pallas_kernels.paged_attention.tiles import AttentionTiles

FIELDS = ("row", "rows", "seq", "begin", "end", "part", "parts", "num_rows", "num_prefill", "num_decode")
"""Columns of a work table. `row`, `rows`: the item's rows of the step (0 rows: no item). `seq`: their sequence.
`begin`, `end`: positions `begin .. end - 1` of a prefill item's rows, or of a decode item's keys. `part`, `parts`: a
decode item's chunk among those of its sequence's context, which are consecutive in the table. The same in every row:
`num_rows`, rows of the step with a sequence; `num_prefill`, `num_decode`, numbers of items."""

MOST_ROUNDS = 6
"""Decode items beyond one per sequence occupy the device's programs at most this many times."""


@dataclass(frozen=True)
class WorkShape:
    """Static shape of a work table.

    Attributes:
      programs: programs that reside on the device at once.
      tile_rows: most rows of a prefill item.
      prefill_items, decode_items: rows of the table for each kind.
      block: keys per block of a decode item; chunks are whole blocks.
      max_blocks: bound of a context's blocks.
      kv_heads, group, window: as in `AttentionShape`.
    """

    programs: int
    tile_rows: int
    prefill_items: int
    decode_items: int
    block: int
    max_blocks: int
    kv_heads: int
    group: int
    window: int | None

    @classmethod
    def of(cls, shape: AttentionShape, plan: TritonPlan) -> WorkShape:
        """Returns the shape for the current trace's device; a CPU counts as one multiprocessor."""
        device = devices.target()
        programs = plan.per_sm * (device.num_sms if device else 1)
        tile_rows = prefill_items = 0
        if not shape.decode:
            tile_rows = plan.prefill_m // shape.group
            # n sequences of more than one row have at most (max_rows - n) / tile_rows + n tiles
            prefill_items = shape.max_rows // tile_rows + min(shape.num_seqs, shape.max_rows // 2)
        decode_items = shape.num_seqs + ceil_div(MOST_ROUNDS * programs, shape.num_kv_heads)
        blocks, heads = (plan.block_n, ceil_div(shape.max_tokens, plan.block_n)), (shape.num_kv_heads, shape.group)
        return cls(programs, tile_rows, prefill_items, decode_items, *blocks, *heads, shape.window)

    @property
    def items(self) -> int:
        """Rows of the table."""
        return self.prefill_items + self.decode_items

    @property
    def grid(self) -> int:
        """Launched programs."""
        return min(self.programs, self.items * self.kv_heads)


def work_table(tiles: AttentionTiles, shape: WorkShape) -> jax.Array:
    """Builds the table: int32 `[shape.items, len(FIELDS)]`. Prefill items, most keys first, begin at row 0; decode
    items, longest context first, at row `shape.prefill_items`. Rows without an item follow those of each kind."""
    kinds = [_decode_items(tiles, shape)]
    num_decode, num_prefill = kinds[0][1], jnp.int32(0)
    if shape.prefill_items:
        kinds.insert(0, _prefill_items(tiles, shape))
        num_prefill = kinds[0][1]
    counts = tiles.length.sum(), num_prefill, num_decode
    tables = [
        jnp.stack([*columns, *(jnp.full_like(columns[0], count) for count in counts)], axis=1) for columns, _ in kinds
    ]
    return jnp.concatenate(tables).astype(jnp.int32)


def _prefill_items(tiles: AttentionTiles, shape: WorkShape) -> tuple[tuple[jax.Array, ...], jax.Array]:
    """Columns and number of the tiles of sequences with several rows."""
    rows, items = shape.tile_rows, shape.prefill_items
    seq, index, live, count = _list(jnp.where(tiles.length > 1, _ceil_div(tiles.length, rows), 0), items)
    own = jnp.where(live, jnp.minimum(tiles.length[seq] - index * rows, rows), 0)
    begin = jnp.where(live, tiles.context[seq] + index * rows, 0)
    order = jnp.argsort(-(begin + own), stable=True)
    columns = tiles.first_row[seq] + index * rows, own, seq, begin, begin + own
    nothing = jnp.zeros_like(seq)
    return (*(column[order] for column in columns), nothing, nothing), count


def _decode_items(tiles: AttentionTiles, shape: WorkShape) -> tuple[tuple[jax.Array, ...], jax.Array]:
    """Columns and number of the chunks of the contexts of sequences with one row. All chunks of a sequence but its last
    have one length, in whole blocks."""
    seq = tiles.decode_seq
    live = jnp.arange(seq.shape[0]) < tiles.num_decode
    end = jnp.where(live, tiles.context[seq] + 1, 0)
    begin = jnp.zeros_like(end) if shape.window is None else jnp.maximum(end - shape.window, 0)
    blocks = _ceil_div(end - begin, shape.block)
    parts = split(blocks, shape)
    chunk = _ceil_div(blocks, jnp.maximum(parts, 1)) * shape.block

    entry, part, live, count = _list(parts, shape.decode_items)
    begin = begin[entry] + part * chunk[entry]
    end = jnp.minimum(begin + chunk[entry], end[entry])
    seq = seq[entry]
    return (tiles.first_row[seq], live, seq, begin, end, part, parts[entry]), count


def split(blocks: Any, shape: WorkShape) -> Any:
    """Plans the chunks of decode contexts for an even load of the device's programs.

    The candidates are lengths of the longest chunk, at most 3% apart. A chunk of n blocks costs n + 1; the last one
    stands for its start and its partial result. The time is estimated as the smaller of two: full rounds of the longest
    chunk, exact for equal contexts; and the mean load of a program plus half the longest chunk, because a free program
    takes the next item, and the shortest come last. Adding up the longest context's partial results comes on top. The
    candidate with the least time is chosen.

    Args:
      blocks: int `[S]`, NumPy's or JAX's: blocks of each context, the longest first; 0: no context.

    Returns:
      int `[S]`: number of chunks of each context; their sum is at most `shape.decode_items`.
    """
    xp = blocks.__array_namespace__()
    lengths = xp.asarray(_lengths(shape.max_blocks))
    chunks = _ceil_div(blocks, lengths[:, None]).sum(1)
    # In float32, which XLA computes within the reduction, unlike integer divisions.
    share = np.float32(shape.kv_heads / shape.programs)
    cost = xp.minimum(lengths, blocks[0]) + 1  # of the longest chunk
    parts = xp.ceil(blocks[0] / lengths.astype(np.float32))
    rounds = xp.ceil(chunks * share - 1e-4) * cost
    mean = (blocks.sum() + chunks) * share + cost / 2
    time = xp.minimum(rounds, xp.maximum(mean, cost)) + parts * np.float32(shape.group / shape.block)
    return _ceil_div(blocks, lengths[xp.argmin(xp.where(chunks <= shape.decode_items, time, xp.inf))])


def _lengths(most: int) -> np.ndarray:
    """Chunk lengths from 1 to `most`, each at most 3% or 1 above the one before: int32."""
    steps = np.ceil(1.03 ** np.arange(np.ceil(np.log(most) / np.log(1.03))))
    return np.unique(np.append(steps, most)).astype(np.int32)


def count_items(rows: np.ndarray, context: np.ndarray, shape: WorkShape) -> tuple[int, int]:
    """Returns the numbers of prefill and decode items in the table of a step. rows, context: int `[S]`, each sequence's
    rows in the step, and its tokens before them."""
    prefill = _ceil_div(rows[rows > 1], shape.tile_rows).sum() if shape.prefill_items else 0
    keys = np.minimum(context[rows == 1] + 1, shape.window or np.inf).astype(int)
    decode = split(np.sort(_ceil_div(keys, shape.block))[::-1], shape).sum() if keys.size else 0
    return int(prefill), int(decode)


def _ceil_div(a: Any, b: Any) -> Any:
    return (a + b - 1) // b


def _list(counts: jax.Array, items: int) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
    """Lists `counts[i]` items of every `i`: (i, number among those of i, whether the entry is used) of each, and the
    number of used entries."""
    ends = jnp.cumsum(counts)
    item = jnp.arange(items)
    owner = jnp.minimum((ends[None, :] <= item[:, None]).sum(1), counts.shape[0] - 1)
    return owner, item - (ends - counts)[owner], item < ends[-1], ends[-1]
