"""Reference of the gathered LoRA product in plain JAX: work in proportion to live ranks, no stack of padded adapters.

The unit of work is a *group*: up to `GROUP` ranks of every projection of a stack at once. Where a group's rows lie in
the pool is worked out once per step and shared by all layers (`prepare`); each layer then only reads them. Two regimes,
by how many rows share an adapter:

- *rows*: every row has (nearly) an adapter of its own. Rows are taken `ROW_CHUNK` at a time, each with its own
  weights, read in place: the products are written as sums that XLA fuses with the gather.
- *tiles*: each tile of rows shares one adapter; a group is one matrix product.

Trip counts are data, so nothing is recompiled when adapters come and go.
"""

from __future__ import annotations

from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels.lora.layout import LoraLayout, Stack, StackTiles, ceil_div

GROUP = 16
"""Ranks per projection in one unit of work."""

ROW_CHUNK = 64
"""Rows that are worked on together in the row regime."""

LANES = 64
"""Columns summed side by side in the row regime's shrink, so that a CPU's vector units are filled."""


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class StackRows:
    """Where one stack's rows lie in the pool, seen as rows `[num_pages * 2 * page_size, W]`, for M adapters.

    groups: int32 `[M]`, live groups. a_row: int32 `[G, M, projections, GROUP, A chunks]`; b_row: int32 `[G, M, B chunks
    of all projections, GROUP]`; b_live: bool, same shape. Dead entries name row 0 of the dummy page; b_live masks them.
    Where A's rows are dealt to shards, a_groups and a_row's G count the rows of a shard.
    """

    groups: jax.Array
    a_groups: jax.Array
    a_row: jax.Array
    b_row: jax.Array
    b_live: jax.Array


def prepare(
    layout: LoraLayout, pages: jax.Array, ranks: jax.Array, slot: jax.Array, live: jax.Array, max_rank: int
) -> tuple[StackRows, ...]:
    """Row addresses of every stack of the adapters in `slot [M]`; `pages`, `ranks` as in `AdapterTable`. Entries from
    `live` (int32 scalar) on have rank 0: their slot's pages may have a new owner."""
    ranks = jnp.where(jnp.arange(slot.shape[0])[:, None] < live, ranks[slot], 0)  # [M, 7]
    tiles, _ = layout.stack_tiles(ranks)
    index = jnp.arange(_whole_groups(max_rank))  # rank within a projection
    return tuple(
        _stack_rows(layout, s, t, pages, ranks, slot, index) for s, t in zip(layout.stacks, tiles, strict=True)
    )


def _stack_rows(
    layout: LoraLayout,
    stack: Stack,
    tiles: StackTiles,
    pages: jax.Array,
    ranks: jax.Array,
    slot: jax.Array,
    index: jax.Array,
) -> StackRows:
    size, chunks = layout.page_size, layout.a_chunks(stack)

    def pool_row(tile: jax.Array, within: jax.Array, live: jax.Array) -> jax.Array:
        """Pool row of row `within` of an adapter's tile number `tile`, all `[M, R, chunks]`."""
        page = pages.at[slot[:, None, None], tile // 2].get(mode="clip")
        return jnp.where(live, (2 * page + tile % 2) * size + within, 0)

    def places(row: jax.Array, rank: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Of a projection's ranks at `row [M, R]` of the stack: row block `[M, R]`, row within it and whether the rank
        is there, both `[M, R, 1]`."""
        live = (index[None, : row.shape[1]] < rank[:, None])[..., None]
        return row // size, (row % size)[..., None], live

    a_rows, b_rows, b_live = [], [], []
    first = a_first = jnp.zeros_like(slot)
    for position in range(len(stack.projections)):
        rank = ranks[:, stack.rank_index[position]]
        row = first[:, None] + index[None]  # [M, R] row of the stack
        first = first + rank
        block, within, live = places(row, rank)
        wide = StackTiles(
            *(f[:, None] for f in (tiles.a_base, tiles.b_base, tiles.a_rows, tiles.rows, tiles.wide_blocks))
        )
        a_block, a_within, a_live = block, within, live
        if stack.rank_shards > 1:
            a_rank = stack.a_ranks(rank)
            a_row = a_first[:, None] + index[None, : _whole_groups(stack.a_ranks(index.size))]
            a_first = a_first + a_rank
            a_block, a_within, a_live = places(a_row, a_rank)
        a_tile = layout.a_tile(stack, wide, a_block)[..., None] + jnp.arange(chunks)
        a_rows.append(pool_row(a_tile, a_within, a_live))  # [M, R, chunks]
        b_tile = layout.b_tile(stack, wide, block)[..., None] + jnp.arange(
            ceil_div(stack.d_outs[position], layout.width)
        )
        b_rows.append(pool_row(b_tile, within, live))  # [M, R, B chunks]
        b_live.append(jnp.broadcast_to(live, b_tile.shape))

    def by_group(rows: jax.Array) -> jax.Array:  # [M, n, R, ...] -> [G, M, n, GROUP, ...]
        m, n, r, *rest = rows.shape
        return jnp.moveaxis(rows.reshape(m, n, r // GROUP, GROUP, *rest), 2, 0)

    largest = ranks[:, jnp.array(stack.rank_index)].max(-1)
    groups = ceil_div(largest, GROUP)
    return StackRows(
        groups=groups,
        a_groups=groups if stack.rank_shards == 1 else ceil_div(stack.a_ranks(largest), GROUP),
        a_row=by_group(jnp.stack(a_rows, 1)),
        b_row=by_group(jnp.moveaxis(jnp.concatenate(b_rows, -1), -1, 1)),
        b_live=by_group(jnp.moveaxis(jnp.concatenate(b_live, -1), -1, 1)),
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
    x = _split_columns(x, stack.d_in, width).astype(jnp.float32)  # [T, A chunks, W]
    lanes = LANES if width % LANES == 0 else width
    projection = _projection_of_chunk(stack, layout)

    def row_chunk(i: jax.Array, acc: jax.Array) -> jax.Array:
        first_row = begin + i * chunk
        start = jnp.clip(first_row, 0, num_rows - chunk)
        own = start + jnp.arange(chunk) >= first_row  # the last chunk may reach back into the one before
        x_rows = lax.dynamic_slice_in_dim(x, start, chunk)[:, None, None]  # [M, 1, 1, A chunks, W]

        def group(g: jax.Array, delta: jax.Array) -> jax.Array:
            a_row = lax.dynamic_slice_in_dim(rows.a_row[g], start, chunk)  # [M, p, GROUP, A chunks]
            a = flat.at[a_row].get(mode="clip")  # fused into the sums below, never stored
            partial = sum(
                x_rows[..., c, w : w + lanes] * a[..., c, w : w + lanes]
                for c in range(x.shape[1])
                for w in range(0, width, lanes)
            )
            h = lax.optimization_barrier(partial).sum(-1)  # [M, p, GROUP]; the barrier keeps the wide sums one loop
            live = lax.dynamic_slice_in_dim(rows.b_live[g], start, chunk) & own[:, None, None]
            h = lax.optimization_barrier(jnp.where(live, h[:, projection], 0.0))  # [M, B chunks, GROUP]
            b_row = lax.dynamic_slice_in_dim(rows.b_row[g], start, chunk)
            return delta + sum(h[..., j, None] * flat.at[b_row[..., j]].get(mode="clip") for j in range(GROUP))

        groups = jnp.max(jnp.where(own, lax.dynamic_slice_in_dim(rows.groups, start, chunk), 0))
        old = lax.dynamic_slice_in_dim(acc, start, chunk)
        new = lax.fori_loop(0, groups, group, _split_outputs(old, stack, layout))
        return lax.dynamic_update_slice_in_dim(acc, _join_outputs(new, stack, layout), start, 0)

    acc = lax.fori_loop(0, ceil_div(end - begin, chunk), row_chunk, y.astype(jnp.float32))
    return acc.astype(y.dtype)


def add_tiles(
    x: jax.Array,
    y: jax.Array,
    pool: jax.Array,
    stack: Stack,
    layout: LoraLayout,
    rows: StackRows,
    first_row: jax.Array,
    num_rows: jax.Array,
    num_tiles: jax.Array,
    tile_rows: int,
) -> jax.Array:
    """Adds the LoRA part to `y [T, d_out]`, tile by tile: tile i is rows `first_row[i] .. + num_rows[i]` (at most
    `tile_rows`), all of the adapter that `rows` describes in entry i."""
    width = layout.width
    flat = pool.reshape(-1, width)
    x = _split_columns(x, stack.d_in, width)  # [T, A chunks, W]
    exact = lax.Precision.HIGHEST if x.dtype == jnp.float32 else None
    projection = _projection_of_chunk(stack, layout)

    def tile(i: jax.Array, acc: jax.Array) -> jax.Array:
        start = jnp.clip(first_row[i], 0, x.shape[0] - tile_rows)
        row = start + jnp.arange(tile_rows)
        own = (row >= first_row[i]) & (row < first_row[i] + num_rows[i])
        x_rows = lax.dynamic_slice_in_dim(x, start, tile_rows)  # [M, A chunks, W]

        def group(g: jax.Array, delta: jax.Array) -> jax.Array:
            a = flat.at[rows.a_row[g, i]].get(mode="clip")  # [p, GROUP, A chunks, W]
            h = jnp.einsum("mcw,pjcw->pmj", x_rows, a, precision=exact, preferred_element_type=jnp.float32)
            h = jnp.where(rows.b_live[g, i][:, None] & own[None, :, None], h[projection], 0.0)  # [B chunks, M, GROUP]
            b = flat.at[rows.b_row[g, i]].get(mode="clip").astype(jnp.float32)  # [B chunks, GROUP, W]
            return delta + jnp.einsum("nmj,njw->mnw", h, b, precision=lax.Precision.HIGHEST)

        old = lax.dynamic_slice_in_dim(acc, start, tile_rows)
        new = lax.fori_loop(0, rows.groups[i], group, _split_outputs(old, stack, layout))
        return lax.dynamic_update_slice_in_dim(acc, _join_outputs(new, stack, layout), start, 0)

    return lax.fori_loop(0, num_tiles, tile, y.astype(jnp.float32)).astype(y.dtype)


def shrink_tiles(
    x: jax.Array,
    pool: jax.Array,
    stack: Stack,
    layout: LoraLayout,
    rows: StackRows,
    first_row: jax.Array,
    num_rows: jax.Array,
    num_tiles: jax.Array,
    tile_rows: int,
) -> jax.Array:
    """The first half of `add_tiles`: `x A` of every tile, float32 `[T, projections, ranks]`, zero in rows of no tile.
    Ranks that an adapter lacks hold anything finite."""
    flat = pool.reshape(-1, layout.width)
    x = _split_columns(x, stack.d_in, layout.width)  # [T, A chunks, W]
    exact = lax.Precision.HIGHEST if x.dtype == jnp.float32 else None

    def tile(i: jax.Array, h: jax.Array) -> jax.Array:
        start = jnp.clip(first_row[i], 0, x.shape[0] - tile_rows)
        row = start + jnp.arange(tile_rows)
        own = (row >= first_row[i]) & (row < first_row[i] + num_rows[i])
        x_rows = lax.dynamic_slice_in_dim(x, start, tile_rows)  # [M, A chunks, W]

        def group(g: jax.Array, h: jax.Array) -> jax.Array:
            a = flat.at[rows.a_row[g, i]].get(mode="clip")  # [p, GROUP, A chunks, W]
            new = jnp.einsum("mcw,pjcw->mpj", x_rows, a, precision=exact, preferred_element_type=jnp.float32)
            old = lax.dynamic_slice(h, (start, 0, g * GROUP), new.shape)
            return lax.dynamic_update_slice(h, jnp.where(own[:, None, None], new, old), (start, 0, g * GROUP))

        return lax.fori_loop(0, rows.a_groups[i], group, h)

    ranks = rows.a_row.shape[0] * GROUP
    return lax.fori_loop(0, num_tiles, tile, jnp.zeros((x.shape[0], len(stack.projections), ranks), jnp.float32))


def expand_tiles(
    h: jax.Array,
    y: jax.Array,
    pool: jax.Array,
    stack: Stack,
    layout: LoraLayout,
    rows: StackRows,
    first_row: jax.Array,
    num_rows: jax.Array,
    num_tiles: jax.Array,
    tile_rows: int,
) -> jax.Array:
    """The second half of `add_tiles`: adds `h B` to `y [T, d_out]`; h float32 `[T, projections, ranks]`, whole groups
    of ranks."""
    flat = pool.reshape(-1, layout.width)
    projection = _projection_of_chunk(stack, layout)

    def tile(i: jax.Array, acc: jax.Array) -> jax.Array:
        start = jnp.clip(first_row[i], 0, y.shape[0] - tile_rows)
        row = start + jnp.arange(tile_rows)
        own = (row >= first_row[i]) & (row < first_row[i] + num_rows[i])

        def group(g: jax.Array, delta: jax.Array) -> jax.Array:
            part = lax.dynamic_slice(h, (start, 0, g * GROUP), (tile_rows, h.shape[1], GROUP)).swapaxes(0, 1)
            live = rows.b_live[g, i][:, None] & own[None, :, None]  # [B chunks, M, GROUP]
            b = flat.at[rows.b_row[g, i]].get(mode="clip").astype(jnp.float32)  # [B chunks, GROUP, W]
            part = jnp.where(live, part[projection], 0.0)
            return delta + jnp.einsum("nmj,njw->mnw", part, b, precision=lax.Precision.HIGHEST)

        old = lax.dynamic_slice_in_dim(acc, start, tile_rows)
        new = lax.fori_loop(0, rows.groups[i], group, _split_outputs(old, stack, layout))
        return lax.dynamic_update_slice_in_dim(acc, _join_outputs(new, stack, layout), start, 0)

    return lax.fori_loop(0, num_tiles, tile, y.astype(jnp.float32)).astype(y.dtype)


def _whole_groups(ranks: int) -> int:
    return ceil_div(ranks, GROUP) * GROUP


def _projection_of_chunk(stack: Stack, layout: LoraLayout) -> jax.Array:
    """Which projection each B chunk of the stack belongs to: int32 `[B chunks]`."""
    return jnp.array([p for p, d in enumerate(stack.d_outs) for _ in range(ceil_div(d, layout.width))])


def _split_columns(x: jax.Array, columns: int, width: int) -> jax.Array:
    """`[T, columns]` to `[T, chunks, width]`, zero-padded."""
    chunks = ceil_div(columns, width)
    return jnp.pad(x, ((0, 0), (0, chunks * width - columns))).reshape(x.shape[0], chunks, width)


def _split_outputs(y: jax.Array, stack: Stack, layout: LoraLayout) -> jax.Array:
    """The stack's fused output `[M, d_out]` to `[M, B chunks, W]`, each projection zero-padded to whole chunks."""
    parts = [y[:, at : at + d] for at, d in zip(stack.columns, stack.d_outs, strict=True)]
    return jnp.concatenate([_split_columns(part, part.shape[1], layout.width) for part in parts], axis=1)


def _join_outputs(delta: jax.Array, stack: Stack, layout: LoraLayout) -> jax.Array:
    """The inverse of `_split_outputs`."""
    parts, at = [], 0
    for d in stack.d_outs:
        count = ceil_div(d, layout.width)
        parts.append(delta[:, at : at + count].reshape(delta.shape[0], -1)[:, :d])
        at += count
    return jnp.concatenate(parts, axis=1)
