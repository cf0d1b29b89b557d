"""lora_shrink and lora_expand in Triton: Ampere, Ada, Hopper.

An item of shrink is a row tile, a block of ranks and a slice of the input's columns; an item of expand is a row tile
and a block of output columns. Programs stride over the items, whose number is data, so few programs are idle. Pages are
looked up as scalars. Each slice of shrink writes its own plane, and expand adds the planes in a fixed order: no
atomics, no zeroing, deterministic bits.

Constants of both kernels: `BY_PROJECTION`, the columns of h for each projection of a stack; 0 if the stack's ranks
follow one another. `WIDE`: a row tile is the first operand of a product. `BLOCK_M`, `BLOCK_R`, `BLOCK_K`, `BLOCK_N`:
rows of the step, ranks, input and output columns of a product. A stack's items are rows `FIRST_ITEM ..` of its table;
row `LAST_ITEM` is zeros.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import triton
import triton.language as tl

from pallas_kernels.lora.layout import LoraLayout, Stack, ceil_div
from pallas_kernels.lora.plan import MIN_BLOCK, ExpandPlan, ShrinkPlan, programs
from pallas_kernels.lora.work import FIELDS, LoraWork
from pallas_kernels.triton_call import triton_call

WIDE_ROWS = 32
"""Height from which a row tile is the first operand of a product. Lower tiles would fill badly the 16 rows that the
tensor core takes, and are the second operand, whose columns come in eights."""


@triton.jit
def _work(table_ptr, index, FIELDS: tl.constexpr):
    """A row of a work table. All fields are loaded before any is tested: one round trip."""
    row = table_ptr + index * FIELDS
    return (
        tl.load(row), tl.load(row + 1), tl.load(row + 2), tl.load(row + 3), tl.load(row + 4), tl.load(row + 5),
        tl.load(row + 6), tl.load(row + 7),
    )  # fmt: skip


@triton.jit
def _weights(pool_ptr):
    """The pool as weights. Elements of uint16 are the bits of bfloat16 (`kv_format`)."""
    if pool_ptr.dtype.element_ty == tl.uint16:
        pool_ptr = pool_ptr.to(tl.pointer_type(tl.bfloat16))
    return pool_ptr


@triton.jit
def _tile_offset(pages_ptr, tile, SIZE: tl.constexpr):
    """First element of an adapter's tile number `tile`, of `SIZE` elements, in the layer's pool."""
    return (tl.load(pages_ptr + (tile >> 1)).to(tl.int64) * 2 + (tile & 1)) * SIZE


@triton.jit
def _in_tile(column, WIDTH: tl.constexpr):
    """`column % WIDTH` in a form whose divisors the compiler sees, so that it loads 16 bytes at once."""
    return column - column // WIDTH * WIDTH


@triton.jit
def _rows_at(rows, offset, t: tl.constexpr, BLOCK_R: tl.constexpr, PAGE_SIZE: tl.constexpr):
    """`rows` with `offset` in the rows of tile `t` of a block of ranks. If one tile has the whole block, a scalar: the
    compiler makes one address of it, with constant distances."""
    if t == 0:
        return offset
    else:
        return tl.where((tl.arange(0, BLOCK_R) // PAGE_SIZE)[:, None] == t, offset, rows)


@triton.jit
def _a_tiles(
    pages_ptr, tile, tiles, A_CHUNKS: tl.constexpr, BLOCK_R: tl.constexpr, PAGE_SIZE: tl.constexpr, WIDTH: tl.constexpr
):
    """First elements of the tiles of a block of ranks of A, by row: the first is tile number `tile`, `tiles` exist."""
    rows = 0
    for t in tl.static_range(BLOCK_R // PAGE_SIZE):
        offset = _tile_offset(pages_ptr, tile + tl.minimum(t, tiles - 1) * A_CHUNKS, PAGE_SIZE * WIDTH)
        rows = _rows_at(rows, offset, t, BLOCK_R, PAGE_SIZE)
    return rows


@triton.jit
def lora_shrink_kernel(
    x_ptr, pool_ptr, pages_ptr, items_ptr, h_ptr,
    T: tl.constexpr, D_IN: tl.constexpr, WIDTH: tl.constexpr, PAGE_SIZE: tl.constexpr, A_CHUNKS: tl.constexpr,
    MAX_PAGES: tl.constexpr, COLUMNS: tl.constexpr, BY_PROJECTION: tl.constexpr, FIELDS: tl.constexpr,
    FIRST_ITEM: tl.constexpr, LAST_ITEM: tl.constexpr, PROGRAMS: tl.constexpr, WIDE: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_K: tl.constexpr, SLICE_K: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """h[slice, rows of the tile, block of ranks] = x[:, slice] @ A[:, slice]^T."""
    SLICES: tl.constexpr = (D_IN + SLICE_K - 1) // SLICE_K
    ONE_TILE: tl.constexpr = WIDTH % SLICE_K == 0
    pool_ptr = _weights(pool_ptr)
    row, column, j = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_K), tl.arange(0, BLOCK_R)
    i = tl.program_id(0)
    first_row, rows, slot, tile, rank, end0, end1, total = _work(items_ptr, FIRST_ITEM + i // SLICES, FIELDS)
    while rows > 0:
        own, live = row < rows, rank + j < total
        part = i - i // SLICES * SLICES
        k_begin = part * SLICE_K
        adapter, tiles = pages_ptr + slot * MAX_PAGES, (total - rank + PAGE_SIZE - 1) // PAGE_SIZE
        tile += k_begin // WIDTH
        x_tile = x_ptr + first_row.to(tl.int64) * D_IN + k_begin + row[:, None] * D_IN + column[None, :]
        a_tiles = _a_tiles(adapter, tile, tiles, A_CHUNKS, BLOCK_R, PAGE_SIZE, WIDTH)
        acc = tl.zeros([BLOCK_M, BLOCK_R] if WIDE else [BLOCK_R, BLOCK_M], tl.float32)
        for k in tl.range(0, min(SLICE_K, D_IN), BLOCK_K, num_stages=STAGES):
            a_tile = pool_ptr + a_tiles + _in_tile(k_begin + k, WIDTH)
            a_tile += (j % PAGE_SIZE * WIDTH)[:, None] + column[None, :]
            if not ONE_TILE:  # looked up one step ahead, so that no copy waits for the page table
                ahead = tl.minimum(k_begin + k + BLOCK_K, D_IN - 1) // WIDTH - k_begin // WIDTH
                a_tiles = _a_tiles(adapter, tile + ahead, tiles, A_CHUNKS, BLOCK_R, PAGE_SIZE, WIDTH)
            if D_IN % SLICE_K:
                inside = (k_begin + k + column < D_IN)[None, :]
                a = tl.load(a_tile, mask=live[:, None] & inside, other=0.0)
                x = tl.load(x_tile + k, mask=own[:, None] & inside, other=0.0)
            else:
                a = tl.load(a_tile, mask=live[:, None], other=0.0)
                x = tl.load(x_tile + k, mask=own[:, None], other=0.0)
            acc = tl.dot(x, tl.trans(a), acc) if WIDE else tl.dot(a, tl.trans(x), acc)
        h = h_ptr + (part * T + first_row).to(tl.int64) * COLUMNS + row * COLUMNS
        to = rank + j
        if BY_PROJECTION:  # projection p's ranks begin at its own part of the columns
            to -= tl.where(to >= end1, end1 - 2 * BY_PROJECTION, tl.where(to >= end0, end0 - BY_PROJECTION, 0))
        if WIDE:
            tl.store(h[:, None] + to[None, :], acc, mask=own[:, None] & live[None, :])
        else:
            tl.store(h[None, :] + to[:, None], acc, mask=own[None, :] & live[:, None])
        i += PROGRAMS
        index = tl.minimum(FIRST_ITEM + i // SLICES, LAST_ITEM)
        first_row, rows, slot, tile, rank, end0, end1, total = _work(items_ptr, index, FIELDS)


@triton.jit
def _b_at(
    pool_ptr, pages_ptr, b_base, wide_blocks, n, first, begin, end, inside,
    PAGE_SIZE: tl.constexpr, WIDTH: tl.constexpr, WIDE_CHUNKS: tl.constexpr, NARROW_CHUNKS: tl.constexpr,
    BLOCK_R: tl.constexpr, BLOCK_N: tl.constexpr, RAGGED: tl.constexpr,
):  # fmt: skip
    """Pointers to rows `first ..` of a stack's B `[BLOCK_R, BLOCK_N]`, from a projection's column `n` on, and which of
    them are the projection's."""
    j, column = tl.arange(0, BLOCK_R), tl.arange(0, BLOCK_N)
    rows = 0
    for t in tl.static_range(BLOCK_R // PAGE_SIZE):
        block = first // PAGE_SIZE
        if t > 0:
            block = tl.minimum(block + t, (end - 1) // PAGE_SIZE)
        tile = b_base + n // WIDTH + block * WIDE_CHUNKS
        if NARROW_CHUNKS != WIDE_CHUNKS:
            tile -= tl.maximum(block - wide_blocks, 0) * (WIDE_CHUNKS - NARROW_CHUNKS)
        rows = _rows_at(rows, _tile_offset(pages_ptr, tile, PAGE_SIZE * WIDTH), t, BLOCK_R, PAGE_SIZE)
    mask = ((first + j >= begin) & (first + j < end))[:, None]
    if RAGGED:
        mask &= inside[None, :]
    return pool_ptr + rows + _in_tile(n, WIDTH) + (j % PAGE_SIZE * WIDTH)[:, None] + column[None, :], mask


@triton.jit
def _load_b(
    pool_ptr, pages_ptr, b_base, wide_blocks, n, first, begin, end, inside,
    PAGE_SIZE: tl.constexpr, WIDTH: tl.constexpr, WIDE_CHUNKS: tl.constexpr, NARROW_CHUNKS: tl.constexpr,
    BLOCK_R: tl.constexpr, BLOCK_N: tl.constexpr, RAGGED: tl.constexpr,
):  # fmt: skip
    """The weights at `_b_at`; zeros in the rows of other projections."""
    at, mask = _b_at(
        pool_ptr, pages_ptr, b_base, wide_blocks, n, first, begin, end, inside,
        PAGE_SIZE, WIDTH, WIDE_CHUNKS, NARROW_CHUNKS, BLOCK_R, BLOCK_N, RAGGED,
    )  # fmt: skip
    return tl.load(at, mask=mask, other=0.0)


@triton.jit
def _projection(
    block, end0, end1, end2,
    D_OUT: tl.constexpr, D_FIRST: tl.constexpr, D_REST: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Block number `block` of a stack's output columns: the projection, its columns before the block, the stack's
    columns before them, the projection's first rank, the rank past its last, and its width."""
    if D_OUT == D_FIRST:
        return 0, block * BLOCK_N, 0, 0 * end0, end0, D_FIRST
    else:
        FIRST: tl.constexpr = (D_FIRST + BLOCK_N - 1) // BLOCK_N
        REST: tl.constexpr = (D_REST + BLOCK_N - 1) // BLOCK_N
        projection = tl.where(block < FIRST, 0, 1 + (block - FIRST) // REST)
        rest = projection - 1
        n = tl.where(projection == 0, block, block - FIRST - rest * REST) * BLOCK_N
        column = tl.where(projection == 0, 0, D_FIRST + rest * D_REST)
        begin = tl.where(projection == 0, 0, tl.where(projection == 1, end0, end1))
        end = tl.where(projection == 0, end0, tl.where(projection == 1, end1, end2))
        return projection, n, column, begin, end, tl.where(projection == 0, D_FIRST, D_REST)


@triton.jit
def _load_h(
    h_tile, first, begin, end, own, PLANE: tl.constexpr, SPLITS: tl.constexpr, BY_PROJECTION: tl.constexpr,
    WIDE: tl.constexpr, BLOCK_R: tl.constexpr, dtype: tl.constexpr,
):  # fmt: skip
    """Ranks `first ..` of h, summed over the slices in order, as two numbers of the weights' dtype: the rounded sum and
    its error. Zeros in the ranks of other projections. `[M, BLOCK_R]` if WIDE, else its transpose."""
    j = tl.arange(0, BLOCK_R)
    live = (first + j >= begin) & (first + j < end)
    live = live[None, :] if WIDE else live[:, None]
    own = own[:, None] if WIDE else own[None, :]
    at = (h_tile[:, None] + j[None, :] if WIDE else h_tile[None, :] + j[:, None]) + first
    mask = own & live if BY_PROJECTION else own  # whole blocks are loaded wide; among projections, there may be none
    h = tl.load(at, mask=mask, other=0.0)
    for part in tl.static_range(1, SPLITS):
        h += tl.load(at + part * PLANE, mask=mask, other=0.0)
    h = tl.where(live, h, 0.0)
    high = h.to(dtype)
    return high, (h - high.to(tl.float32)).to(dtype)


@triton.jit
def _expand(
    h_ptr, pool_ptr, pages_ptr, y_ptr, out_ptr, block, first_row, rows, slot, b_base, wide_blocks, end0, end1, end2,
    T: tl.constexpr, D_OUT: tl.constexpr, D_FIRST: tl.constexpr, D_REST: tl.constexpr, WIDTH: tl.constexpr,
    PAGE_SIZE: tl.constexpr, WIDE_CHUNKS: tl.constexpr, NARROW_CHUNKS: tl.constexpr, MAX_PAGES: tl.constexpr,
    COLUMNS: tl.constexpr, BY_PROJECTION: tl.constexpr, SPLITS: tl.constexpr, WIDE: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_N: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """An item of `lora_expand_kernel`: a row tile and block number `block` of columns."""
    PLANE: tl.constexpr = T * COLUMNS
    RAGGED: tl.constexpr = D_FIRST % BLOCK_N != 0 or D_REST % BLOCK_N != 0
    dtype: tl.constexpr = pool_ptr.dtype.element_ty
    projection, n, y_column, begin, end, width = _projection(block, end0, end1, end2, D_OUT, D_FIRST, D_REST, BLOCK_N)
    if end > begin:
        row, column = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_N)
        own, inside = row < rows, n + column < width
        pages_ptr += slot * MAX_PAGES
        first = begin // BLOCK_R * BLOCK_R
        b = _load_b(
            pool_ptr, pages_ptr, b_base, wide_blocks, n, first, begin, end, inside,
            PAGE_SIZE, WIDTH, WIDE_CHUNKS, NARROW_CHUNKS, BLOCK_R, BLOCK_N, RAGGED,
        )  # fmt: skip
        y_tile = first_row.to(tl.int64) * D_OUT + y_column + n
        if WIDE:
            y_at, mask = row[:, None] * D_OUT + column[None, :], own[:, None]
        else:
            y_at, mask = row[None, :] * D_OUT + column[:, None], own[None, :]
        if RAGGED:
            mask &= inside[None, :] if WIDE else inside[:, None]
        y = tl.load(y_ptr + y_tile + y_at, mask=mask, other=0.0)
        h_ptr += first_row.to(tl.int64) * COLUMNS
        if BY_PROJECTION:
            h_ptr += projection * BY_PROJECTION - begin
        h_tile = h_ptr + row * COLUMNS
        high, low = _load_h(h_tile, first, begin, end, own, PLANE, SPLITS, BY_PROJECTION, WIDE, BLOCK_R, dtype)
        acc = tl.dot(high, b, tl.dot(low, b)) if WIDE else tl.dot(tl.trans(b), high, tl.dot(tl.trans(b), low))
        for r in tl.range(first + BLOCK_R, end, BLOCK_R, num_stages=STAGES):
            b = _load_b(
                pool_ptr, pages_ptr, b_base, wide_blocks, n, r, begin, end, inside,
                PAGE_SIZE, WIDTH, WIDE_CHUNKS, NARROW_CHUNKS, BLOCK_R, BLOCK_N, RAGGED,
            )  # fmt: skip
            high, low = _load_h(h_tile, r, begin, end, own, PLANE, SPLITS, BY_PROJECTION, WIDE, BLOCK_R, dtype)
            if WIDE:
                acc = tl.dot(high, b, tl.dot(low, b, acc))
            else:
                acc = tl.dot(tl.trans(b), high, tl.dot(tl.trans(b), low, acc))
        tl.store(out_ptr + y_tile + y_at, (y.to(tl.float32) + acc).to(y.dtype), mask=mask)


@triton.jit
def lora_expand_kernel(
    h_ptr, pool_ptr, pages_ptr, tiles_ptr, y_ptr, out_ptr,
    T: tl.constexpr, D_OUT: tl.constexpr, D_FIRST: tl.constexpr, D_REST: tl.constexpr, WIDTH: tl.constexpr,
    PAGE_SIZE: tl.constexpr, WIDE_CHUNKS: tl.constexpr, NARROW_CHUNKS: tl.constexpr, MAX_PAGES: tl.constexpr,
    COLUMNS: tl.constexpr, BY_PROJECTION: tl.constexpr, SPLITS: tl.constexpr, FIELDS: tl.constexpr,
    FIRST_ITEM: tl.constexpr, LAST_ITEM: tl.constexpr, PROGRAMS: tl.constexpr, WIDE: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_N: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """out[rows of the tile, block of columns] = y + (sum over slices of h) @ B, in place: out is y's buffer."""
    REST: tl.constexpr = (D_OUT - D_FIRST) // D_REST
    BLOCKS: tl.constexpr = (D_FIRST + BLOCK_N - 1) // BLOCK_N + REST * ((D_REST + BLOCK_N - 1) // BLOCK_N)
    pool_ptr = _weights(pool_ptr)
    i = tl.program_id(0)
    first_row, rows, slot, b_base, wide_blocks, end0, end1, end2 = _work(tiles_ptr, FIRST_ITEM + i // BLOCKS, FIELDS)
    while rows > 0:
        _expand(
            h_ptr, pool_ptr, pages_ptr, y_ptr, out_ptr, i - i // BLOCKS * BLOCKS,
            first_row, rows, slot, b_base, wide_blocks, end0, end1, end2,
            T, D_OUT, D_FIRST, D_REST, WIDTH, PAGE_SIZE, WIDE_CHUNKS, NARROW_CHUNKS, MAX_PAGES,
            COLUMNS, BY_PROJECTION, SPLITS, WIDE, BLOCK_M, BLOCK_R, BLOCK_N, STAGES,
        )  # fmt: skip
        if PROGRAMS == (LAST_ITEM - FIRST_ITEM) * BLOCKS:  # a program for every item
            rows = 0
        else:
            i += PROGRAMS
            index = tl.minimum(FIRST_ITEM + i // BLOCKS, LAST_ITEM)
            first_row, rows, slot, b_base, wide_blocks, end0, end1, end2 = _work(tiles_ptr, index, FIELDS)


def lora_shrink(
    x: jax.Array, pool: jax.Array, pages: jax.Array, work: LoraWork, layout: LoraLayout, stack: Stack, *,
    columns: int, by_projection: bool, tile_rows: int, block_r: int, plan: ShrinkPlan, interpret: bool = False,
) -> jax.Array:  # fmt: skip
    """See `pallas_kernels.lora.api.lora_shrink`. columns: of the result. block_r: ranks of an item."""
    num_rows, slices = x.shape[0], plan.splits(stack.d_in)
    (h,) = triton_call(
        lora_shrink_kernel,
        x, pool, pages, work.items,
        out=[jax.ShapeDtypeStruct((slices, num_rows, columns), jnp.float32)],
        interpret=interpret,
        **_launch(work.items, slices, layout, stack, plan, tile_rows, columns if by_projection else 0),
        T=num_rows, D_IN=stack.d_in, WIDTH=layout.width, PAGE_SIZE=layout.page_size,
        A_CHUNKS=layout.a_chunks(stack), MAX_PAGES=pages.shape[1], COLUMNS=columns,
        BLOCK_R=block_r, BLOCK_K=plan.block_k, SLICE_K=plan.slice_k,
    )  # fmt: skip
    return h


def lora_expand(
    h: jax.Array, y: jax.Array, pool: jax.Array, pages: jax.Array, work: LoraWork, layout: LoraLayout, stack: Stack, *,
    by_projection: bool, tile_rows: int, plan: ExpandPlan, interpret: bool = False,
) -> jax.Array:  # fmt: skip
    """See `pallas_kernels.lora.api.lora_expand`."""
    splits, num_rows, columns = h.shape
    wide, narrow = layout.b_chunks(stack)
    blocks = sum(ceil_div(d, plan.block_n) for d in stack.d_outs)
    (out,) = triton_call(
        lora_expand_kernel,
        h, pool, pages, work.tiles, y,
        out=[jax.ShapeDtypeStruct(y.shape, y.dtype)], aliases={4: 0},
        interpret=interpret,
        **_launch(work.tiles, blocks, layout, stack, plan, tile_rows, columns if by_projection else 0),
        T=num_rows, D_OUT=stack.d_out, D_FIRST=stack.d_outs[0], D_REST=stack.d_outs[-1], WIDTH=layout.width,
        PAGE_SIZE=layout.page_size, WIDE_CHUNKS=wide, NARROW_CHUNKS=narrow, MAX_PAGES=pages.shape[1],
        COLUMNS=columns, SPLITS=splits, BLOCK_R=max(layout.page_size, MIN_BLOCK), BLOCK_N=plan.block_n,
    )  # fmt: skip
    return out


def _launch(
    table: jax.Array, parts: int, layout: LoraLayout, stack: Stack, plan: ShrinkPlan | ExpandPlan, tile_rows: int,
    split_columns: int,
) -> dict[str, Any]:  # fmt: skip
    """Arguments of both launches: the programs, which stride over the `parts` of each row of a stack's work table, and
    the height of a tile. split_columns: of h, if each projection has its own part of them; else 0."""
    count, first = table.shape[1] - 1, layout.stacks.index(stack) * table.shape[1]
    grid = programs(plan.programs, count * parts)
    height = max(8, 1 << (tile_rows - 1).bit_length())
    return {
        "grid": (grid,), "PROGRAMS": grid, "FIRST_ITEM": first, "LAST_ITEM": first + count, "FIELDS": FIELDS,
        "BY_PROJECTION": split_columns // len(stack.projections), "BLOCK_M": height, "WIDE": height >= WIDE_ROWS,
        "num_warps": plan.warps, "num_stages": plan.stages, "STAGES": plan.stages,
    }  # fmt: skip
