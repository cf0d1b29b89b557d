"""The gradients of A and B in Triton: Ampere, Ada, Hopper.

An item is an adapter of the step, and a block of columns of x (for A) or of dy (for B). Its program sums over the
adapter's row tiles in order and adds the sum to the gradient in place. No other program writes these elements, so there
are no atomics, and the bits do not depend on the other adapters of the step. The program of B also multiplies dy, which
it has loaded, with its columns of B: `g = dy B^T` comes as one plane for each block of a projection's columns.

Constants are those of `triton.py`; row tiles are `BLOCK_M` rows high.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import triton
import triton.language as tl

from pallas_kernels.lora.layout import LoraLayout, Stack, ceil_div
from pallas_kernels.lora.plan import GradientPlan, programs
from pallas_kernels.lora.triton import _b_at, _projection, _work
from pallas_kernels.lora.work import FIELDS, GradientWork
from pallas_kernels.triton_call import triton_call


@triton.jit
def _gradient(
    left_ptr, right_ptr, pool_ptr, pages_ptr, rows_ptr, gradient_ptr, g_ptr,
    block, first_tile, tiles, slot, base, wide_blocks, end0, end1, end2,
    T: tl.constexpr, D: tl.constexpr, D_FIRST: tl.constexpr, D_REST: tl.constexpr, WIDTH: tl.constexpr,
    PAGE_SIZE: tl.constexpr, WIDE_CHUNKS: tl.constexpr, NARROW_CHUNKS: tl.constexpr, MAX_PAGES: tl.constexpr,
    COLUMNS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_N: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """An item: an adapter and block number `block` of columns. Without `g_ptr`, only the gradient."""
    RAGGED: tl.constexpr = D_FIRST % BLOCK_N != 0 or D_REST % BLOCK_N != 0
    PLANES: tl.constexpr = (D_FIRST + BLOCK_N - 1) // BLOCK_N
    _, n, column, begin, end, width = _projection(block, end0, end1, end2, D, D_FIRST, D_REST, BLOCK_N)
    row, j, inside = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_R), n + tl.arange(0, BLOCK_N) < width
    right_ptr += column + n + row[:, None] * D + tl.arange(0, BLOCK_N)[None, :]
    pages_ptr += slot * MAX_PAGES
    first = begin // PAGE_SIZE * PAGE_SIZE
    while first < end:
        first = tl.multiple_of(first, PAGE_SIZE)
        live = ((first + j >= begin) & (first + j < end))[None, :]
        left_tile = left_ptr + first + row[:, None] * COLUMNS + j[None, :]
        if g_ptr is not None:
            b_tile, b_live = _b_at(
                pool_ptr, pages_ptr, base, wide_blocks, n, first, begin, end, inside,
                PAGE_SIZE, WIDTH, WIDE_CHUNKS, NARROW_CHUNKS, BLOCK_R, BLOCK_N, RAGGED,
            )  # fmt: skip
            b = tl.trans(tl.load(b_tile, mask=b_live, other=0.0))
            g_tile = g_ptr + first + row[:, None] * COLUMNS + j[None, :]
        acc = tl.zeros([BLOCK_N, BLOCK_R], tl.float32)
        at = tl.load(rows_ptr + first_tile).to(tl.int64)
        for t in tl.range(0, tiles, num_stages=STAGES):
            if RAGGED:
                right = tl.load(right_ptr + at * D, mask=inside[None, :], other=0.0)
            else:
                right = tl.load(right_ptr + at * D)
            # Ranks of other projections come along, 16 bytes at once; their sums are not stored.
            left = tl.load(left_tile + at * COLUMNS, mask=(first + j < COLUMNS)[None, :], other=0.0)
            acc = tl.dot(tl.trans(right), left, acc)
            if g_ptr is not None:
                g = tl.dot(right, b)
                tl.store(g_tile + (n // BLOCK_N * T + at) * COLUMNS, g, mask=live)
            at = tl.load(rows_ptr + first_tile + tl.minimum(t + 1, tiles - 1)).to(tl.int64)
        if g_ptr is not None and D_FIRST != D_REST:
            # A narrower projection has fewer blocks of columns. Zeros fill its other planes.
            blocks = (width + BLOCK_N - 1) // BLOCK_N
            for t in range(0, tiles):
                at = tl.load(rows_ptr + first_tile + t).to(tl.int64)
                for plane in range(n // BLOCK_N + blocks, PLANES, blocks):
                    zeros = tl.zeros([BLOCK_M, BLOCK_R], tl.float32)
                    tl.store(g_tile + (plane * T + at) * COLUMNS, zeros, mask=live)
        tile, own = _b_at(
            gradient_ptr, pages_ptr, base, wide_blocks, n, first, begin, end, inside,
            PAGE_SIZE, WIDTH, WIDE_CHUNKS, NARROW_CHUNKS, BLOCK_R, BLOCK_N, RAGGED,
        )  # fmt: skip
        tl.store(tile, tl.load(tile, mask=own, other=0.0) + tl.trans(acc), mask=own)
        first += BLOCK_R


@triton.jit
def _gradients(
    left_ptr, right_ptr, pool_ptr, pages_ptr, adapters_ptr, rows_ptr, gradient_ptr, g_ptr,
    T: tl.constexpr, D: tl.constexpr, D_FIRST: tl.constexpr, D_REST: tl.constexpr, WIDTH: tl.constexpr,
    PAGE_SIZE: tl.constexpr, WIDE_CHUNKS: tl.constexpr, NARROW_CHUNKS: tl.constexpr, MAX_PAGES: tl.constexpr,
    COLUMNS: tl.constexpr, FIELDS: tl.constexpr, FIRST_ITEM: tl.constexpr, LAST_ITEM: tl.constexpr,
    PROGRAMS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_N: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """A program's items, which are data: see `lora_expand_kernel`."""
    REST: tl.constexpr = (D - D_FIRST) // D_REST
    BLOCKS: tl.constexpr = (D_FIRST + BLOCK_N - 1) // BLOCK_N + REST * ((D_REST + BLOCK_N - 1) // BLOCK_N)
    i = tl.program_id(0)
    first_tile, tiles, slot, base, wide_blocks, end0, end1, end2 = _work(adapters_ptr, FIRST_ITEM + i // BLOCKS, FIELDS)
    while tiles > 0:
        _gradient(
            left_ptr, right_ptr, pool_ptr, pages_ptr, rows_ptr, gradient_ptr, g_ptr,
            i - i // BLOCKS * BLOCKS, first_tile, tiles, slot, base, wide_blocks, end0, end1, end2,
            T, D, D_FIRST, D_REST, WIDTH, PAGE_SIZE, WIDE_CHUNKS, NARROW_CHUNKS, MAX_PAGES,
            COLUMNS, BLOCK_M, BLOCK_R, BLOCK_N, STAGES,
        )  # fmt: skip
        i += PROGRAMS
        index = tl.minimum(FIRST_ITEM + i // BLOCKS, LAST_ITEM)
        first_tile, tiles, slot, base, wide_blocks, end0, end1, end2 = _work(adapters_ptr, index, FIELDS)


@triton.jit
def lora_gradient_b_kernel(
    h_ptr, dy_ptr, pool_ptr, pages_ptr, adapters_ptr, rows_ptr, before_ptr, gradient_ptr, g_ptr,
    T: tl.constexpr, D: tl.constexpr, D_FIRST: tl.constexpr, D_REST: tl.constexpr, WIDTH: tl.constexpr,
    PAGE_SIZE: tl.constexpr, WIDE_CHUNKS: tl.constexpr, NARROW_CHUNKS: tl.constexpr, MAX_PAGES: tl.constexpr,
    COLUMNS: tl.constexpr, FIELDS: tl.constexpr, FIRST_ITEM: tl.constexpr, LAST_ITEM: tl.constexpr,
    PROGRAMS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_N: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """gradient[B] += h^T @ dy, in place: gradient is before's buffer. g[plane] = dy[:, block] @ B[:, block]^T."""
    _gradients(
        h_ptr, dy_ptr, pool_ptr, pages_ptr, adapters_ptr, rows_ptr, gradient_ptr, g_ptr,
        T, D, D_FIRST, D_REST, WIDTH, PAGE_SIZE, WIDE_CHUNKS, NARROW_CHUNKS, MAX_PAGES, COLUMNS,
        FIELDS, FIRST_ITEM, LAST_ITEM, PROGRAMS, BLOCK_M, BLOCK_R, BLOCK_N, STAGES,
    )  # fmt: skip


@triton.jit
def lora_gradient_a_kernel(
    g_ptr, x_ptr, pages_ptr, adapters_ptr, rows_ptr, before_ptr, gradient_ptr,
    T: tl.constexpr, D: tl.constexpr, D_FIRST: tl.constexpr, D_REST: tl.constexpr, WIDTH: tl.constexpr,
    PAGE_SIZE: tl.constexpr, WIDE_CHUNKS: tl.constexpr, NARROW_CHUNKS: tl.constexpr, MAX_PAGES: tl.constexpr,
    COLUMNS: tl.constexpr, FIELDS: tl.constexpr, FIRST_ITEM: tl.constexpr, LAST_ITEM: tl.constexpr,
    PROGRAMS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_N: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """gradient[A] += g^T @ x, in place: gradient is before's buffer."""
    _gradients(
        g_ptr, x_ptr, None, pages_ptr, adapters_ptr, rows_ptr, gradient_ptr, None,
        T, D, D_FIRST, D_REST, WIDTH, PAGE_SIZE, WIDE_CHUNKS, NARROW_CHUNKS, MAX_PAGES, COLUMNS,
        FIELDS, FIRST_ITEM, LAST_ITEM, PROGRAMS, BLOCK_M, BLOCK_R, BLOCK_N, STAGES,
    )  # fmt: skip


def gradient_b(
    h: jax.Array, dy: jax.Array, pool: jax.Array, gradient: jax.Array, work: GradientWork, layout: LoraLayout,
    stack: Stack, *, tile_rows: int, plan: GradientPlan, interpret: bool,
) -> tuple[jax.Array, jax.Array]:  # fmt: skip
    """Adds `h^T dy` to the gradient of B, and computes `g = dy B^T`.

    Args:
      h: `x A`, `[T, columns]` in dy's dtype.
      dy: `[T, stack.d_out]`.
      pool: one layer's pool `[num_pages, 2, page_size, W]`.
      gradient: float32, as the pool; its buffer is reused if it is not read again.

    Returns:
      The gradient, and g, float32 `[planes, T, columns]`: to be added up. Entries outside the row tiles and ranks of
      the step's adapters are undefined.
    """
    planes = jax.ShapeDtypeStruct((ceil_div(stack.d_outs[0], plan.block_n), *h.shape), jnp.float32)
    after, g = triton_call(
        lora_gradient_b_kernel,
        h, dy, pool, work.pages, work.b_adapters, work.first_row, gradient,
        out=[jax.ShapeDtypeStruct(gradient.shape, gradient.dtype), planes], aliases={6: 0}, interpret=interpret,
        **_launch(work.b_adapters, h, stack.d_outs, layout, stack, work, tile_rows, plan),
    )  # fmt: skip
    return after, g


def gradient_a(
    g: jax.Array, x: jax.Array, gradient: jax.Array, work: GradientWork, layout: LoraLayout, stack: Stack, *,
    tile_rows: int, plan: GradientPlan, interpret: bool,
) -> jax.Array:  # fmt: skip
    """Adds `g^T x` to the gradient of A. g: `[T, columns]` in x's dtype. x: `[T, stack.d_in]`. Otherwise as in
    `gradient_b`."""
    (after,) = triton_call(
        lora_gradient_a_kernel,
        g, x, work.pages, work.a_adapters, work.first_row, gradient,
        out=[jax.ShapeDtypeStruct(gradient.shape, gradient.dtype)], aliases={5: 0}, interpret=interpret,
        **_launch(work.a_adapters, g, (stack.d_in,), layout, stack, work, tile_rows, plan),
    )  # fmt: skip
    return after


def _launch(
    table: jax.Array, left: jax.Array, widths: tuple[int, ...], layout: LoraLayout, stack: Stack, work: GradientWork,
    tile_rows: int, plan: GradientPlan,
) -> dict[str, Any]:  # fmt: skip
    """Arguments of both launches. widths: of the projections whose weights `table` describes."""
    count, first = table.shape[1] - 1, layout.stacks.index(stack) * table.shape[1]
    grid = programs(plan.programs, count * sum(ceil_div(d, plan.block_n) for d in widths))
    return {
        "grid": (grid,), "PROGRAMS": grid, "FIRST_ITEM": first, "LAST_ITEM": first + count, "FIELDS": FIELDS,
        "T": left.shape[0], "D": sum(widths), "D_FIRST": widths[0], "D_REST": widths[-1],
        "WIDTH": layout.width, "PAGE_SIZE": layout.page_size, "MAX_PAGES": work.pages.shape[1],
        "WIDE_CHUNKS": ceil_div(widths[0], layout.width), "NARROW_CHUNKS": ceil_div(widths[-1], layout.width),
        "COLUMNS": left.shape[1], "BLOCK_M": tile_rows, "BLOCK_R": plan.block_r, "BLOCK_N": plan.block_n,
        "num_warps": plan.warps, "num_stages": plan.stages, "STAGES": plan.stages,
    }  # fmt: skip
