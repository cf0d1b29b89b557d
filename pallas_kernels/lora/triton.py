"""lora_shrink and lora_expand in Triton: Ampere, Ada, Hopper.

A program of shrink computes one row tile and one slice of the input's columns, and loops over the adapter's live rank
rows; a program of expand computes one row tile and one block of output columns. Weights are read from pool tiles by row
address, each byte once per tile. Each slice of shrink writes its own plane, and expand adds the planes in a fixed
order: no atomics, no zeroing, deterministic bits.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import triton
import triton.language as tl

from pallas_kernels.lora.layout import LoraLayout, Stack, ceil_div
from pallas_kernels.lora.plan import ExpandPlan, ShrinkPlan
from pallas_kernels.lora.work import FIELDS
from pallas_kernels.triton_call import triton_call


@triton.jit
def _row_addresses(pages_ptr, tile, within, live, PAGE_SIZE: tl.constexpr, WIDTH: tl.constexpr):
    """First element of row `within` of an adapter's tile number `tile` in the layer's pool."""
    page = tl.load(pages_ptr + tile // 2, mask=live, other=0).to(tl.int64)
    return ((page * 2 + tile % 2) * PAGE_SIZE + within) * WIDTH


@triton.jit
def _b_tile(block, wide_blocks, WIDE_CHUNKS: tl.constexpr, NARROW_CHUNKS: tl.constexpr):
    """`LoraLayout.b_tile`, counted from the stack's first B tile."""
    return tl.minimum(block, wide_blocks) * WIDE_CHUNKS + tl.maximum(block - wide_blocks, 0) * NARROW_CHUNKS


@triton.jit
def lora_shrink_kernel(
    x_ptr, pool_ptr, pages_ptr, work_ptr, h_ptr,
    T: tl.constexpr, D_IN: tl.constexpr, WIDTH: tl.constexpr, PAGE_SIZE: tl.constexpr, A_CHUNKS: tl.constexpr,
    MAX_PAGES: tl.constexpr, MAX_RANK: tl.constexpr, PROJECTIONS: tl.constexpr, FIELDS: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_K: tl.constexpr, SLICE_K: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """h[slice, rows of the tile, live ranks] = x[:, slice] @ A[:, slice]^T."""
    tile, part = tl.program_id(0), tl.program_id(1)
    work = work_ptr + tile * FIELDS
    first_row, rows = tl.load(work), tl.load(work + 1)
    pages_ptr += tl.load(work + 2) * MAX_PAGES
    a_base = tl.load(work + 3)
    end0, end1, total = tl.load(work + 6), tl.load(work + 7), tl.load(work + 8)
    if rows == 0:
        return

    row = tl.arange(0, BLOCK_M)
    own = row < rows
    column = tl.arange(0, BLOCK_K)
    x_tile = x_ptr + (first_row + row).to(tl.int64)[:, None] * D_IN + column[None, :]
    h_tile = h_ptr + (part * T + first_row + row).to(tl.int64)[:, None] * (PROJECTIONS * MAX_RANK)
    k_begin = part * SLICE_K
    k_end = tl.minimum(k_begin + SLICE_K, D_IN)
    for j in tl.range(0, total, BLOCK_R, flatten=True):
        r = j + tl.arange(0, BLOCK_R)
        live = r < total
        acc = tl.zeros([BLOCK_M, BLOCK_R], tl.float32)
        for k in tl.range(k_begin, k_end, BLOCK_K, num_stages=STAGES):
            chunk = k // WIDTH
            tile_of_row = a_base + r // PAGE_SIZE * A_CHUNKS + chunk
            address = _row_addresses(pages_ptr, tile_of_row, r % PAGE_SIZE, live, PAGE_SIZE, WIDTH)
            in_k = k + column < D_IN
            a_mask = live[None, :] & in_k[:, None] if D_IN % BLOCK_K else live[None, :]
            x_mask = own[:, None] & in_k[None, :] if D_IN % BLOCK_K else own[:, None]
            a = tl.load(pool_ptr + address[None, :] + (k - chunk * WIDTH + column)[:, None], mask=a_mask, other=0.0)
            x = tl.load(x_tile + k, mask=x_mask, other=0.0)
            acc = tl.dot(x, a, acc)
        # Projection p's ranks begin at column p * MAX_RANK of h, so that expand reads them aligned.
        begin = tl.where(r >= end1, end1 - 2 * MAX_RANK, tl.where(r >= end0, end0 - MAX_RANK, 0))
        tl.store(h_tile + (r - begin)[None, :], acc, mask=own[:, None] & live[None, :])


@triton.jit
def _sum_of_slices(h_ptr, rank, own, live, PLANE: tl.constexpr, SPLITS: tl.constexpr, dtype: tl.constexpr):
    """The sum of shrink's slices, in order, as two numbers of the weights' dtype: the rounded sum and its error."""
    h = tl.load(h_ptr + rank[None, :], mask=own[:, None], other=0.0)  # whole blocks of ranks: wide loads
    for part in tl.static_range(1, SPLITS):
        h += tl.load(h_ptr + part * PLANE + rank[None, :], mask=own[:, None], other=0.0)
    h = tl.where(live[None, :], h, 0.0)
    high = h.to(dtype)
    return high, (h - high.to(tl.float32)).to(dtype)


@triton.jit
def lora_expand_kernel(
    h_ptr, pool_ptr, pages_ptr, work_ptr, y_ptr, out_ptr,
    T: tl.constexpr, D_OUT: tl.constexpr, D_FIRST: tl.constexpr, D_REST: tl.constexpr, WIDTH: tl.constexpr,
    PAGE_SIZE: tl.constexpr, WIDE_CHUNKS: tl.constexpr, NARROW_CHUNKS: tl.constexpr, MAX_PAGES: tl.constexpr,
    MAX_RANK: tl.constexpr, PROJECTIONS: tl.constexpr, SPLITS: tl.constexpr, FIELDS: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_N: tl.constexpr, SPAN_N: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """out[rows of the tile, span of columns] = y + (sum over slices of h) @ B, in place: out is y's buffer."""
    span, tile = tl.program_id(0), tl.program_id(1)
    FIRST_SPANS: tl.constexpr = (D_FIRST + SPAN_N - 1) // SPAN_N
    REST_SPANS: tl.constexpr = (D_REST + SPAN_N - 1) // SPAN_N
    PLANE: tl.constexpr = T * PROJECTIONS * MAX_RANK
    dtype: tl.constexpr = pool_ptr.dtype.element_ty
    projection = tl.where(span < FIRST_SPANS, 0, 1 + (span - FIRST_SPANS) // REST_SPANS)
    n_begin = tl.where(projection == 0, span, (span - FIRST_SPANS) % REST_SPANS) * SPAN_N
    n_end = tl.minimum(n_begin + SPAN_N, tl.where(projection == 0, D_FIRST, D_REST))
    work = work_ptr + tile * FIELDS
    first_row, rows = tl.load(work), tl.load(work + 1)
    pages_ptr += tl.load(work + 2) * MAX_PAGES
    b_base, wide_blocks = tl.load(work + 4), tl.load(work + 5)
    end = tl.load(work + 6 + projection)
    begin = tl.where(projection == 0, 0, tl.load(work + 5 + projection))
    rank = end - begin
    if rows * rank == 0:
        return

    row = tl.arange(0, BLOCK_M)
    own = row < rows
    column = tl.arange(0, BLOCK_N)
    y_tile = (first_row + row).to(tl.int64)[:, None] * D_OUT + column[None, :]
    y_tile += tl.where(projection == 0, 0, D_FIRST + (projection - 1) * D_REST)
    h_ptr += (first_row + row).to(tl.int64)[:, None] * (PROJECTIONS * MAX_RANK) + projection * MAX_RANK
    j = tl.arange(0, BLOCK_R)
    if rank <= BLOCK_R:  # the common case: h is read once, and B is streamed
        r = begin + j
        tile_of_row = b_base + _b_tile(r // PAGE_SIZE, wide_blocks, WIDE_CHUNKS, NARROW_CHUNKS)
        high, low = _sum_of_slices(h_ptr, j, own, j < rank, PLANE, SPLITS, dtype)
        for n in tl.range(n_begin, n_end, BLOCK_N, num_stages=STAGES):
            inside = n + column < n_end
            chunk = n // WIDTH
            address = _row_addresses(pages_ptr, tile_of_row + chunk, r % PAGE_SIZE, j < rank, PAGE_SIZE, WIDTH)
            mask = own[:, None] & inside[None, :]
            y = tl.load(y_ptr + y_tile + n, mask=mask, other=0.0)
            b_mask = (j < rank)[:, None] & inside[None, :]
            b = tl.load(pool_ptr + address[:, None] + (n - chunk * WIDTH + column)[None, :], mask=b_mask, other=0.0)
            acc = tl.dot(high, b, tl.dot(low, b))
            tl.store(out_ptr + y_tile + n, (y.to(tl.float32) + acc).to(y.dtype), mask=mask)
    else:
        for n in range(n_begin, n_end, BLOCK_N):
            inside = n + column < n_end
            chunk = n // WIDTH
            mask = own[:, None] & inside[None, :]
            y = tl.load(y_ptr + y_tile + n, mask=mask, other=0.0)
            acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
            for first in tl.range(0, rank, BLOCK_R, num_stages=STAGES - 2):
                live = first + j < rank
                r = begin + first + j
                tile_of_row = b_base + chunk + _b_tile(r // PAGE_SIZE, wide_blocks, WIDE_CHUNKS, NARROW_CHUNKS)
                address = _row_addresses(pages_ptr, tile_of_row, r % PAGE_SIZE, live, PAGE_SIZE, WIDTH)
                b_mask = live[:, None] & inside[None, :]
                b = tl.load(pool_ptr + address[:, None] + (n - chunk * WIDTH + column)[None, :], mask=b_mask, other=0.0)
                high, low = _sum_of_slices(h_ptr, first + j, own, live, PLANE, SPLITS, dtype)
                acc = tl.dot(high, b, tl.dot(low, b, acc))
            tl.store(out_ptr + y_tile + n, (y.to(tl.float32) + acc).to(y.dtype), mask=mask)


def lora_shrink(
    x: jax.Array, pool: jax.Array, pages: jax.Array, work: jax.Array, layout: LoraLayout, stack: Stack, *,
    max_rank: int, tile_rows: int, plan: ShrinkPlan, interpret: bool = False,
) -> jax.Array:  # fmt: skip
    """See `pallas_kernels.lora.api.lora_shrink`."""
    num_rows, ranks = x.shape[0], len(stack.projections) * max_rank
    (h,) = triton_call(
        lora_shrink_kernel,
        x, pool, pages, work,
        out=[jax.ShapeDtypeStruct((plan.splits(stack.d_in), num_rows, ranks), jnp.float32)],
        grid=(work.shape[0], plan.splits(stack.d_in)),
        num_warps=plan.warps, num_stages=plan.stages, interpret=interpret,
        T=num_rows, D_IN=stack.d_in, WIDTH=layout.width, PAGE_SIZE=layout.page_size,
        A_CHUNKS=layout.a_chunks(stack), MAX_PAGES=pages.shape[1], MAX_RANK=max_rank,
        PROJECTIONS=len(stack.projections), FIELDS=len(FIELDS),
        BLOCK_M=1 << (tile_rows - 1).bit_length(), BLOCK_R=plan.block_r, BLOCK_K=plan.block_k,
        SLICE_K=plan.slice_k, STAGES=plan.stages,
    )  # fmt: skip
    return h


def lora_expand(
    h: jax.Array, y: jax.Array, pool: jax.Array, pages: jax.Array, work: jax.Array, layout: LoraLayout, stack: Stack, *,
    tile_rows: int, plan: ExpandPlan, interpret: bool = False,
) -> jax.Array:  # fmt: skip
    """See `pallas_kernels.lora.api.lora_expand`."""
    splits, num_rows, ranks = h.shape
    max_rank = ranks // len(stack.projections)
    if max_rank % plan.block_r:
        raise ValueError(f"lora_expand: block_r={plan.block_r} does not divide the {max_rank} rank columns of h")
    spans = sum(ceil_div(d, plan.span_n) for d in stack.d_outs)
    wide, narrow = layout.b_chunks(stack)
    (out,) = triton_call(
        lora_expand_kernel,
        h, pool, pages, work, y,
        out=[jax.ShapeDtypeStruct(y.shape, y.dtype)], aliases={4: 0},
        grid=(spans, work.shape[0]),
        num_warps=plan.warps, num_stages=plan.stages, interpret=interpret,
        T=num_rows, D_OUT=stack.d_out, D_FIRST=stack.d_outs[0], D_REST=stack.d_outs[-1], WIDTH=layout.width,
        PAGE_SIZE=layout.page_size, WIDE_CHUNKS=wide, NARROW_CHUNKS=narrow, MAX_PAGES=pages.shape[1],
        MAX_RANK=max_rank, PROJECTIONS=len(stack.projections), SPLITS=splits,
        FIELDS=len(FIELDS), BLOCK_M=1 << (tile_rows - 1).bit_length(), BLOCK_R=plan.block_r, BLOCK_N=plan.block_n,
        SPAN_N=plan.span_n, STAGES=plan.stages,
    )  # fmt: skip
    return out
