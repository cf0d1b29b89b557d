"""Reference of the gathered LoRA product in plain JAX: work in proportion to live ranks, no stack of padded adapters.

The unit of work is a *group*: up to `GROUP` ranks of every projection of a stack. The addresses of a group's rows in
the pool are computed once per step and shared by all layers (`prepare`). Two regimes, by the rows of each adapter:

- *rows*: (nearly) every row has its own adapter. Rows are processed `ROW_CHUNK` at a time, each with its own weights,
  read in place: the products are written as sums that XLA fuses with the gather.
- *tiles*: each tile of rows shares one adapter; a group is one matrix product.

Trip counts are data, so loading or evicting adapters recompiles nothing.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels.kv_format import weights_at
from pallas_kernels.lora.layout import ENDS, LoraLayout, Stack, StackTiles, ceil_div
from pallas_kernels.lora.tiles import LoraTiles

GROUP = 16
"""Ranks per projection in one unit of work."""

ROW_CHUNK = 8
"""Rows processed together in the row regime, as long as their highest rank takes. Rows are in order of rank, so that
few wait for others."""

LANES = 64
"""Columns summed side by side in the row regime's shrink, to fill a CPU's vector units."""


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class StackRows:
    """Addresses of one stack's rows in the pool as rows `[num_pages * 2 * page_size, W]`, for M adapters.

    Attributes:
      groups: int32 `[M]`, live groups.
      a_groups: int32 `[M]`, live groups of A; with A sharded by rank, this and a_row's G count a shard's rows.
      a_row: int32 `[G, M, projections, GROUP, A chunks]`.
      b_row: int32 `[G, M, B chunks of all projections, GROUP]`. Dead entries are row 0 of the dummy page.
      b_live: bool, as b_row.
    """

    groups: jax.Array
    a_groups: jax.Array
    a_row: jax.Array
    b_row: jax.Array
    b_live: jax.Array


CLIP: Any = {"mode": "clip", "wrap_negative_indices": False}
"""Gather mode: no index is negative, and reads past the end are masked."""


def prepare(
    layout: LoraLayout, pages: jax.Array, ranks: jax.Array, slot: jax.Array, live: jax.Array, max_rank: int
) -> tuple[StackRows, ...]:
    """Row addresses of every stack of the adapters in `slot [M]`; `pages`, `ranks` as in `AdapterTable`. Entries from
    `live` (int32 scalar) on have rank 0: their slot's pages may have a new owner."""
    ranks = jnp.where(jnp.arange(slot.shape[0])[:, None] < live, ranks[slot], 0)  # [M, 7 or 10]
    tiles, _ = layout.stack_tiles(ranks)
    return tuple(
        stack_rows(layout, s, t, pages, ranks, slot, max_rank) for s, t in zip(layout.stacks, tiles, strict=True)
    )


def prepare_end(
    layout: LoraLayout, name: str, pages: jax.Array, ranks: jax.Array, slot: jax.Array, live: jax.Array, max_rank: int
) -> StackRows:
    """Row addresses of one of `layout.ends`, like `prepare`; `ranks` is `[slots, 10]`."""
    ranks = jnp.where(jnp.arange(slot.shape[0])[:, None] < live, ranks[slot], 0)
    number, (places, _) = ENDS.index(name), layout.end_tiles(ranks)
    return stack_rows(layout, layout.ends[number], places[number], pages, ranks, slot, max_rank)


def stack_rows(
    layout: LoraLayout,
    stack: Stack,
    tiles: StackTiles,
    pages: jax.Array,
    ranks: jax.Array,
    slot: jax.Array,
    max_rank: int,
) -> StackRows:
    """Row addresses of one stack of M adapters, which lie at `tiles` of the pages of `slot [M]`; `ranks` is `[M, 7]`.

    Every array is computed in its final order, `[G, M, n, GROUP, ...]`: a CPU compiles a kernel for each reordering,
    and compilation takes time by the kernel.
    """
    size = layout.page_size
    wide = StackTiles(*(field[:, None, None] for field in dataclasses.astuple(tiles)))  # [M, 1, 1]
    rank = lax.slice_in_dim(ranks, stack.rank_index[0], stack.rank_index[-1] + 1, axis=1)  # [M, p]

    def places(rank: jax.Array, largest: int) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Row block, row within it, and whether the rank is there, of every rank of each projection: `[G, M, p,
        GROUP]`."""
        index = jnp.arange(_whole_groups(largest)).reshape(-1, 1, 1, GROUP)
        parts = [lax.index_in_dim(rank, i, 1) for i in range(rank.shape[1])]  # [M, 1] each
        first = jnp.concatenate([sum(parts[:i], jnp.zeros_like(parts[0])) for i in range(len(parts))], axis=1)
        return *_divmod(first[..., None] + index, size), index < rank[..., None]

    def pool_rows(tile: jax.Array, within: jax.Array, live: jax.Array) -> jax.Array:
        """Pool rows of rows `within` of an adapter's tiles; all arrays are `[G, M, ...]`."""
        page, half = _divmod(tile, 2)
        page = pages.at[slot.reshape(-1, *(1,) * (tile.ndim - 2)), page].get(**CLIP)
        return jnp.where(live, (2 * page + half) * size + within, 0)

    def of_chunk(rows: jax.Array) -> jax.Array:  # [G, M, p, GROUP] -> [G, M, B chunks, GROUP]
        return rows.at[:, :, projection_of_chunk(stack, layout)].get(**CLIP)

    block, within, live = places(rank, max_rank)
    a_block, a_within, a_live = block, within, live
    if stack.rank_shards > 1:
        a_block, a_within, a_live = places(stack.a_ranks(rank), stack.a_ranks(max_rank))
    a_tile = layout.a_tile(stack, wide, a_block)[..., None] + jnp.arange(layout.a_chunks(stack))
    first_chunk = jnp.array([c for d in stack.d_outs for c in range(ceil_div(d, layout.width))])
    b_tile = of_chunk(layout.b_tile(stack, wide, block)) + first_chunk[:, None]
    groups = ceil_div(rank.max(-1), GROUP)
    return StackRows(
        groups=groups,
        a_groups=groups if stack.rank_shards == 1 else ceil_div(stack.a_ranks(rank.max(-1)), GROUP),
        a_row=pool_rows(a_tile, a_within[..., None], a_live[..., None]),
        b_row=pool_rows(b_tile, of_chunk(within), of_chunk(live)),
        b_live=of_chunk(live),
    )


def add_rows(
    x: jax.Array,
    y: jax.Array,
    pool: jax.Array,
    stack: Stack,
    layout: LoraLayout,
    rows: StackRows,
    begin: jax.Array,
    end: jax.Array,
) -> jax.Array:
    """Adds the LoRA part to rows `begin .. end` of `y [T, d_out]`; `rows` has an entry per row,
    dead ones from `end` on."""
    num_rows, chunk, width = x.shape[0], min(ROW_CHUNK, x.shape[0]), layout.width
    flat = pool.reshape(-1, width)
    x = split_columns(x, stack.d_in, width).astype(jnp.float32)  # [T, A chunks, W]
    lanes = LANES if width % LANES == 0 else width
    projection = projection_of_chunk(stack, layout)

    def row_chunk(i: jax.Array, acc: jax.Array) -> jax.Array:
        first_row = begin + i * chunk
        start = jnp.clip(first_row, 0, num_rows - chunk)
        own = start + jnp.arange(chunk) >= first_row  # the last chunk may reach back into the one before
        x_rows = lax.dynamic_slice_in_dim(x, start, chunk)[:, None, None]  # [M, 1, 1, A chunks, W]

        def group(g: jax.Array, delta: jax.Array) -> jax.Array:
            a_row = lax.dynamic_slice_in_dim(rows.a_row[g], start, chunk)  # [M, p, GROUP, A chunks]
            a = weights_at(flat, a_row, **CLIP)  # fused into the sums below, never stored
            partial = sum(
                x_rows[..., c, w : w + lanes] * a[..., c, w : w + lanes]
                for c in range(x.shape[1])
                for w in range(0, width, lanes)
            )
            h = lax.optimization_barrier(partial).sum(-1)  # [M, p, GROUP]; the barrier keeps the wide sums one loop
            live = lax.dynamic_slice_in_dim(rows.b_live[g], start, chunk) & own[:, None, None]
            h = lax.optimization_barrier(jnp.where(live, h[:, projection], 0.0))  # [M, B chunks, GROUP]
            b_row = lax.dynamic_slice_in_dim(rows.b_row[g], start, chunk)
            return delta + sum(h[..., j, None] * weights_at(flat, b_row[..., j], **CLIP) for j in range(GROUP))

        groups = jnp.max(jnp.where(own, lax.dynamic_slice_in_dim(rows.groups, start, chunk), 0))
        old = lax.dynamic_slice_in_dim(acc, start, chunk)
        new = lax.fori_loop(0, groups, group, split_outputs(old, stack, layout))
        return lax.dynamic_update_slice_in_dim(acc, join_outputs(new, stack, layout), start, 0)

    acc = lax.fori_loop(0, ceil_div(end - begin, chunk), row_chunk, y.astype(jnp.float32))
    return acc.astype(y.dtype)


def add_tiles(
    x: jax.Array,
    y: jax.Array,
    pool: jax.Array,
    stack: Stack,
    layout: LoraLayout,
    rows: StackRows,
    tiles: LoraTiles,
    num_tiles: jax.Array,
    tile_rows: int,
) -> jax.Array:
    """Adds the LoRA part to `y [T, d_out]` in tiles `0 .. num_tiles`, of at most `tile_rows` rows; entry i of `rows`
    describes the adapter of tile i. One loop compiles faster than `expand_tiles` after `shrink_tiles`."""
    flat, x = pool.reshape(-1, layout.width), split_columns(x, stack.d_in, layout.width)

    def hidden(i: jax.Array, start: jax.Array) -> Callable[[jax.Array], jax.Array]:
        x_rows = lax.dynamic_slice_in_dim(x, start, tile_rows)  # [M, A chunks, W]
        return lambda g: _shrink_group(x_rows, flat, rows.a_row[g, i])

    return _add_groups(hidden, y, flat, stack, layout, rows, tiles, num_tiles, tile_rows)


def shrink_tiles(
    x: jax.Array,
    pool: jax.Array,
    stack: Stack,
    layout: LoraLayout,
    rows: StackRows,
    tiles: LoraTiles,
    num_tiles: jax.Array,
    tile_rows: int,
) -> jax.Array:
    """`x A` of tiles `0 .. num_tiles`, float32 `[T, projections, ranks]`: zero in rows of no tile, any finite number in
    ranks that an adapter lacks."""
    flat, x = pool.reshape(-1, layout.width), split_columns(x, stack.d_in, layout.width)

    def tile(i: jax.Array, start: jax.Array, own: jax.Array, h: jax.Array) -> jax.Array:
        x_rows = lax.dynamic_slice_in_dim(x, start, tile_rows)  # [M, A chunks, W]

        def group(g: jax.Array, h: jax.Array) -> jax.Array:
            new = _shrink_group(x_rows, flat, rows.a_row[g, i]).swapaxes(0, 1)  # [M, p, GROUP]
            old = lax.dynamic_slice(h, (start, 0, g * GROUP), new.shape)
            return lax.dynamic_update_slice(h, jnp.where(own[:, None, None], new, old), (start, 0, g * GROUP))

        return lax.fori_loop(0, rows.a_groups[i], group, h)

    ranks = rows.a_row.shape[0] * GROUP
    h = jnp.zeros((x.shape[0], len(stack.projections), ranks), jnp.float32)
    return _for_each_tile(tile, h, tiles, num_tiles, tile_rows)


def expand_tiles(
    h: jax.Array,
    y: jax.Array,
    pool: jax.Array,
    stack: Stack,
    layout: LoraLayout,
    rows: StackRows,
    tiles: LoraTiles,
    num_tiles: jax.Array,
    tile_rows: int,
) -> jax.Array:
    """Adds `h B` to `y [T, d_out]` in tiles `0 .. num_tiles`; h float32 `[T, projections, ranks]`, whole groups of
    ranks."""

    def hidden(i: jax.Array, start: jax.Array) -> Callable[[jax.Array], jax.Array]:
        size = tile_rows, h.shape[1], GROUP
        return lambda g: lax.dynamic_slice(h, (start, 0, g * GROUP), size).swapaxes(0, 1)

    return _add_groups(hidden, y, pool.reshape(-1, layout.width), stack, layout, rows, tiles, num_tiles, tile_rows)


def _shrink_group(x: jax.Array, flat: jax.Array, a_row: jax.Array) -> jax.Array:
    """`x A` of a group's ranks: x `[M, A chunks, W]`, a_row `[p, GROUP, A chunks]` to float32 `[p, M, GROUP]`."""
    a = weights_at(flat, a_row, **CLIP)  # [p, GROUP, A chunks, W]
    exact = lax.Precision.HIGHEST if x.dtype == jnp.float32 else None
    return jnp.einsum("mcw,pjcw->pmj", x, a, precision=exact, preferred_element_type=jnp.float32)


def _add_groups(
    hidden: Callable[[jax.Array, jax.Array], Callable[[jax.Array], jax.Array]],
    y: jax.Array,
    flat: jax.Array,
    stack: Stack,
    layout: LoraLayout,
    rows: StackRows,
    tiles: LoraTiles,
    num_tiles: jax.Array,
    tile_rows: int,
) -> jax.Array:
    """Adds `h B` to `y [T, d_out]` group by group; `hidden(i, start)(g)` is h `[p, M, GROUP]` of tile i's group g, in
    rows from `start` on."""
    columns = projection_columns(stack, layout)

    def tile(i: jax.Array, start: jax.Array, own: jax.Array, acc: jax.Array) -> jax.Array:
        h_of = hidden(i, start)

        def group(g: jax.Array, delta: jax.Array) -> jax.Array:
            h, parts = h_of(g), []
            for number, (chunks, of_y) in enumerate(columns):
                live = rows.b_live[g, i, chunks.start] & own[:, None]  # [M, GROUP]
                b = gathered(flat, rows.b_row[g, i, chunks].T, of_y.stop - of_y.start)  # [GROUP, d]
                parts.append(jnp.dot(jnp.where(live, h[number], 0.0), b, precision=lax.Precision.HIGHEST))
            return delta + jnp.concatenate(parts, 1)

        old = lax.dynamic_slice_in_dim(acc, start, tile_rows)
        return lax.dynamic_update_slice_in_dim(acc, lax.fori_loop(0, rows.groups[i], group, old), start, 0)

    return _for_each_tile(tile, y.astype(jnp.float32), tiles, num_tiles, tile_rows).astype(y.dtype)


def projection_columns(stack: Stack, layout: LoraLayout) -> list[tuple[slice, slice]]:
    """The B chunks, and the columns of the fused output, of each projection."""
    found, chunk = [], 0
    for at, d in zip(stack.columns, stack.d_outs, strict=True):
        count = ceil_div(d, layout.width)
        found.append((slice(chunk, chunk + count), slice(at, at + d)))
        chunk += count
    return found


def gathered(flat: jax.Array, row: jax.Array, columns: int) -> jax.Array:
    """The matrix whose row j is made of the pool's rows `row[j]`, float32 `[ranks, columns]`."""
    return weights_at(flat, row, **CLIP).astype(jnp.float32).reshape(row.shape[0], -1)[:, :columns]


def _for_each_tile(
    step: Callable[[jax.Array, jax.Array, jax.Array, jax.Array], jax.Array],
    carry: jax.Array,
    tiles: LoraTiles,
    num_tiles: jax.Array,
    tile_rows: int,
) -> jax.Array:
    """Runs `carry = step(i, start, own, carry)` for tiles `0 .. num_tiles`. Of the `tile_rows` rows from `start` on,
    tile i has those where `own` (bool `[tile_rows]`) holds."""

    def tile(i: jax.Array, carry: jax.Array) -> jax.Array:
        first_row = tiles.first_row[i]
        start = jnp.clip(first_row, 0, carry.shape[0] - tile_rows)
        row = start + jnp.arange(tile_rows)
        return step(i, start, (row >= first_row) & (row < first_row + tiles.rows[i]), carry)

    return lax.fori_loop(0, num_tiles, tile, carry)


def _divmod(a: jax.Array, b: int) -> tuple[jax.Array, jax.Array]:
    """`a // b` and `a % b` of numbers >= 0, in two operations."""
    return lax.div(a, jnp.asarray(b, a.dtype)), lax.rem(a, jnp.asarray(b, a.dtype))


def _whole_groups(ranks: int) -> int:
    return ceil_div(ranks, GROUP) * GROUP


def projection_of_chunk(stack: Stack, layout: LoraLayout) -> jax.Array:
    """Which projection each B chunk of the stack belongs to: int32 `[B chunks]`."""
    return jnp.array([p for p, d in enumerate(stack.d_outs) for _ in range(ceil_div(d, layout.width))])


def split_columns(x: jax.Array, columns: int, width: int) -> jax.Array:
    """`[T, columns]` to `[T, chunks, width]`, zero-padded."""
    chunks = ceil_div(columns, width)
    return jnp.pad(x, ((0, 0), (0, chunks * width - columns))).reshape(x.shape[0], chunks, width)


def split_outputs(y: jax.Array, stack: Stack, layout: LoraLayout) -> jax.Array:
    """The stack's fused output `[M, d_out]` to `[M, B chunks, W]`, each projection zero-padded to whole chunks."""
    if _whole_chunks(stack, layout):
        return y.reshape(y.shape[0], -1, layout.width)
    parts = [y[:, at : at + d] for at, d in zip(stack.columns, stack.d_outs, strict=True)]
    return jnp.concatenate([split_columns(part, part.shape[1], layout.width) for part in parts], axis=1)


def join_outputs(delta: jax.Array, stack: Stack, layout: LoraLayout) -> jax.Array:
    """The inverse of `split_outputs`."""
    if _whole_chunks(stack, layout):
        return delta.reshape(delta.shape[0], -1)
    parts, at = [], 0
    for d in stack.d_outs:
        count = ceil_div(d, layout.width)
        parts.append(delta[:, at : at + count].reshape(delta.shape[0], -1)[:, :d])
        at += count
    return jnp.concatenate(parts, axis=1)


def _whole_chunks(stack: Stack, layout: LoraLayout) -> bool:
    """Returns whether no projection of the stack needs padding, so that splitting its output is only a new shape."""
    return all(d % layout.width == 0 for d in stack.d_outs)
