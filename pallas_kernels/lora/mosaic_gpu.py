"""lora_shrink and lora_expand in Pallas Mosaic GPU: Hopper.

Tensor cores of Hopper take 64 rows at least, and a decode tile has few. So the operands are swapped: the weights are
the 64 rows (ranks in shrink, output columns in expand) and the tokens are the narrow side, 8 to 256 wide. A weight
tile comes by one bulk copy with a barrier of its own; only live pages and live rows are copied and waited for, so
weights are read once. What a buffer holds where nothing was copied reaches only products that are not stored, or is
set to zero.

Of a plan, block_r is rounded up to 64; `warps` means nothing here: a program is one warpgroup, which starts its copies
`stages - 1` steps ahead.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels import devices
from pallas_kernels.lora.layout import LoraLayout, Stack, ceil_div
from pallas_kernels.lora.plan import ExpandPlan, ShrinkPlan

ROWS = 64
"""Rows of one tensor-core product."""

SWIZZLE = 64
"""16-bit columns of one swizzled row in shared memory: every block is a multiple of it."""

PARAMS = plgpu.CompilerParams(unsafe_no_auto_barriers=True)
"""`commit_smem` stands wherever the four warps of a program must wait for each other: before a buffer that they have
read or written goes to a copy or a product."""

BY_ROW = plgpu.Layout.WGMMA_TRANSPOSED
"""A thread holds neighbours of a product's first axis, which lie side by side in memory."""


def _wait(copies: Iterable[tuple[jax.Array, Any]]) -> None:
    """Waits for the copies that were started: (whether it was, its barrier) each."""
    for started, barrier in copies:

        @pl.when(started)
        def _(barrier: Any = barrier) -> None:
            plgpu.barrier_wait(barrier)


def _row_pieces(rows: jax.Array, most: int) -> list[tuple[int, jax.Array, jax.Array]]:
    """`rows` (at most `most`) as a sum of powers of two: for each its size, its first row, and whether it is there.
    A copy has a static size, and no row of another tile may be written."""
    sizes = [1 << bit for bit in reversed(range(most.bit_length()))]
    return [(size, rows // (2 * size) * (2 * size), rows & size != 0) for size in sizes]


def _page(pages: Any, slot: jax.Array, tile: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Page id and half of an adapter's tile number `tile`."""
    return pages[slot, tile // 2], lax.rem(tile, 2)


def _shrink(
    x: Any, pool: Any, pages: Any, work: Any, h: Any, a_smem: Any, x_smem: Any, h_smem: Any,
    a_arrived: Any, x_arrived: Any, *,
    layout: LoraLayout, stack: Stack, slice_k: int,
) -> None:  # fmt: skip
    """h[part, rows of the tile, live ranks] = x[:, slice] @ A[:, slice]^T."""
    stages, block_r, block_k = a_smem.shape
    window, page_size, width = x_smem.shape[1], layout.page_size, layout.width
    tile, part = lax.axis_index("tile"), lax.axis_index("part")
    first_row, rows, slot, a_base, total = (work[tile, field] for field in (0, 1, 2, 3, 8))
    start = pl.multiple_of(jnp.minimum(first_row // 8 * 8, x.shape[0] - window), 8)  # as copies must
    is_short = first_row + rows <= start + 8  # most tiles of a decode step have one row
    k_begin = part * slice_k
    k_steps = jnp.minimum(slice_k, stack.d_in - k_begin) // block_k
    steps = ceil_div(total, block_r) * k_steps

    def is_live(block: jax.Array, i: int) -> jax.Array:
        return block * block_r + i * page_size < total

    def issue(step: jax.Array) -> None:
        """Starts the copies of one step: A[block of ranks, block_k columns] and x[window, block_k columns]."""
        stage = lax.rem(step, stages)
        block, k = step // k_steps, k_begin + lax.rem(step, k_steps) * block_k
        chunk, column = k // width, pl.multiple_of(lax.rem(k, width), block_k)
        for i in range(block_r // page_size):

            @pl.when(is_live(block, i))
            def _(i: int = i) -> None:
                row_block = block * (block_r // page_size) + i
                page, half = _page(pages, slot, a_base + row_block * layout.a_chunks(stack) + chunk)
                plgpu.copy_gmem_to_smem(
                    pool.at[page, half, :, pl.ds(column, block_k)],
                    a_smem.at[stage, pl.ds(i * page_size, page_size)],
                    a_arrived[i].at[stage],
                )

        for size, fits in ((8, is_short), (window, jnp.logical_not(is_short))):

            @pl.when(fits)
            def _(size: int = size) -> None:
                plgpu.copy_gmem_to_smem(
                    x.at[pl.ds(start, size), pl.ds(pl.multiple_of(k, block_k), block_k)],
                    x_smem.at[stage, pl.ds(0, size)],
                    x_arrived.at[stage],
                )

    @pl.when(rows * total > 0)
    def _() -> None:
        @pl.loop(0, jnp.minimum(stages - 1, steps))
        def _(step: jax.Array) -> None:
            issue(step)

        @pl.loop(0, ceil_div(total, block_r))
        def _(block: jax.Array) -> None:
            def product(acc: Any) -> jax.Array:
                @pl.loop(0, k_steps)
                def _(k: jax.Array) -> None:
                    step = block * k_steps + k
                    stage = lax.rem(step, stages)
                    _wait((is_live(block, i), barrier.at[stage]) for i, barrier in enumerate(a_arrived))
                    plgpu.barrier_wait(x_arrived.at[stage])
                    plgpu.wgmma(acc, a_smem.at[stage], x_smem.at[stage].transpose((1, 0)))
                    plgpu.wgmma_wait(1)  # every warp has read the stage of the step before
                    plgpu.commit_smem()

                    @pl.when(step + stages - 1 < steps)
                    def _() -> None:
                        issue(step + stages - 1)

                return acc[...]  # [block_r, window]

            by_rank = pl.run_scoped(product, plgpu.ACC((block_r, window)))
            h_smem.transpose((1, 0))[...] = plgpu.layout_cast(by_rank, BY_ROW)
            plgpu.commit_smem()
            for size, offset, there in _row_pieces(rows, min(window, h.shape[1])):

                @pl.when(there)
                def _(size: int = size, offset: jax.Array = offset) -> None:
                    plgpu.copy_smem_to_gmem(
                        h_smem.at[pl.ds(first_row - start + offset, size)],
                        h.at[part, pl.ds(first_row + offset, size), pl.ds(block * block_r, block_r)],
                    )

            plgpu.wait_smem_to_gmem(0, wait_read_only=True)


def lora_shrink(
    x: jax.Array, pool: jax.Array, pages: jax.Array, work: jax.Array, layout: LoraLayout, stack: Stack, *,
    max_rank: int, tile_rows: int, plan: ShrinkPlan, interpret: bool = False,
) -> jax.Array:  # fmt: skip
    """See `pallas_kernels.lora.api.lora_shrink`; but rank j of h is row j of the stack, and its last axis is rounded up
    to the plan's block_r."""
    _check(pool, layout)
    return _shrink_launch(x, pool, pages, work, layout, stack, max_rank, _tokens(tile_rows), plan, interpret)


@functools.partial(jax.jit, static_argnums=range(4, 10))  # one kernel for all layers
def _shrink_launch(
    x: jax.Array, pool: jax.Array, pages: jax.Array, work: jax.Array,
    layout: LoraLayout, stack: Stack, max_rank: int, tokens: int, plan: ShrinkPlan, interpret: bool,
) -> jax.Array:  # fmt: skip
    num_rows = x.shape[0]
    x = jnp.pad(x, ((0, -num_rows % 8), (0, 0)))
    block_r = ceil_div(plan.block_r, ROWS) * ROWS
    block_k = _block("d_in", plan.block_k, layout.width, stack.d_in)
    slice_k = ceil_div(plan.slice_k, block_k) * block_k
    splits = ceil_div(stack.d_in, slice_k)
    window = min(tokens + 8, x.shape[0])
    kernel = plgpu.kernel(
        functools.partial(_shrink, layout=layout, stack=stack, slice_k=slice_k),
        kernel_name="lora_shrink",
        out_type=jax.ShapeDtypeStruct(
            (splits, num_rows, ceil_div(len(stack.projections) * max_rank, block_r) * block_r), jnp.float32
        ),
        grid=(work.shape[0], splits),
        grid_names=("tile", "part"),
        scratch_types=[
            *_buffers(
                ((plan.stages, block_r, block_k), pool.dtype),
                ((plan.stages, window, block_k), pool.dtype),
                ((window, block_r), jnp.float32),
            ),
            (plgpu.Barrier(num_barriers=plan.stages),) * (block_r // layout.page_size),
            plgpu.Barrier(num_barriers=plan.stages),
        ],
        compiler_params=PARAMS,
        interpret=_interpreter(interpret),
    )
    return kernel(x.astype(pool.dtype), pool, pages, work)


def _expand(
    h: Any, pool: Any, pages: Any, work: Any, y: Any,
    h_smem: Any, high_smem: Any, low_smem: Any, b_smem: Any, y_smem: Any,
    h_arrived: Any, b_arrived: Any, y_arrived: Any, *,
    layout: LoraLayout, stack: Stack, span_n: int,
) -> None:  # fmt: skip
    """y[rows of the tile, span of columns] += (sum over slices of h) @ B."""
    stages, block_r, block_n = b_smem.shape
    tokens, splits = h_smem.shape[:2]
    page_size, width = layout.page_size, layout.width
    wide_chunks, narrow_chunks = layout.b_chunks(stack)
    d_first, d_rest = stack.d_outs[0], stack.d_outs[-1]
    first_spans, rest_spans = ceil_div(d_first, span_n), ceil_div(d_rest, span_n)

    tile, span = lax.axis_index("tile"), lax.axis_index("span")
    first_row, rows, slot, b_base, wide_blocks = (work[tile, field] for field in (0, 1, 2, 4, 5))
    is_first = span < first_spans
    projection = jnp.where(is_first, 0, 1 + (span - first_spans) // rest_spans)
    begin = jnp.where(is_first, 0, work[tile, 5 + projection])
    end = work[tile, 6 + projection]
    n_begin = jnp.where(is_first, span, lax.rem(span - first_spans, rest_spans)) * span_n
    blocks = jnp.minimum(span_n, jnp.where(is_first, d_first, d_rest) - n_begin) // block_n
    y_begin = n_begin + jnp.where(is_first, 0, d_first + (projection - 1) * d_rest)
    base = begin // page_size * page_size  # the product's first rank is a page's first row
    k_steps = ceil_div(end - base, block_r)
    steps = blocks * k_steps
    pieces = _row_pieces(rows, min(tokens, y.shape[0]))

    def is_live(k: jax.Array, i: int) -> jax.Array:
        return base + k * block_r + i * page_size < end

    def y_columns(block: jax.Array) -> Any:
        return pl.ds(pl.multiple_of(y_begin + block * block_n, block_n), block_n)

    def issue(step: jax.Array) -> None:
        """Starts the copies of one step: B[block_r ranks, block_n columns]; with a block's first ranks, its y."""
        stage, block, k = lax.rem(step, stages), step // k_steps, lax.rem(step, k_steps)
        n = n_begin + block * block_n
        chunk, column = n // width, pl.multiple_of(lax.rem(n, width), block_n)
        for i in range(block_r // page_size):
            b_rows = b_smem.at[stage, pl.ds(i * page_size, page_size)]

            @pl.when(is_live(k, i))
            def _(i: int = i, b_rows: Any = b_rows) -> None:
                row_block = (base + k * block_r) // page_size + i
                in_wide = jnp.minimum(row_block, wide_blocks) * wide_chunks
                in_narrow = jnp.maximum(row_block - wide_blocks, 0) * narrow_chunks
                page, half = _page(pages, slot, b_base + in_wide + in_narrow + chunk)
                plgpu.copy_gmem_to_smem(pool.at[page, half, :, pl.ds(column, block_n)], b_rows, b_arrived[i].at[stage])

            is_first_use = (step < stages) | (k_steps > 1)  # else these rows are clear since the first use

            @pl.when(jnp.logical_not(is_live(k, i)) & is_first_use)
            def _(b_rows: Any = b_rows) -> None:
                zeros = plgpu.layout_cast(jnp.zeros((block_n, page_size), b_smem.dtype), BY_ROW)
                b_rows.transpose((1, 0))[...] = zeros

        @pl.when(k == 0)
        def _() -> None:
            slot = lax.rem(block, stages)
            for (size, offset, there), barrier in zip(pieces, y_arrived, strict=True):

                @pl.when(there)
                def _(size: int = size, offset: jax.Array = offset, barrier: Any = barrier) -> None:
                    plgpu.copy_gmem_to_smem(
                        y.at[pl.ds(first_row + offset, size), y_columns(block)],
                        y_smem.at[slot, pl.ds(offset, size)],
                        barrier.at[slot],
                    )

    def issue_h(k: jax.Array) -> None:
        """Starts the copies of block_r ranks of h, all slices."""
        for (size, offset, there), barrier in zip(pieces, h_arrived, strict=True):

            @pl.when(there)
            def _(size: int = size, offset: jax.Array = offset, barrier: Any = barrier) -> None:
                plgpu.copy_gmem_to_smem(
                    h.at[:, pl.ds(first_row + offset, size), pl.ds(base + k * block_r, block_r)],
                    h_smem.at[pl.ds(offset, size)].transpose((1, 0, 2)),
                    barrier,
                )

    @pl.when((rows > 0) & (begin < end))
    def _() -> None:
        issue_h(jnp.int32(0))

        @pl.loop(0, jnp.minimum(stages - 1, steps))
        def _(step: jax.Array) -> None:
            issue(step)

        @pl.loop(0, k_steps)
        def _(k: jax.Array) -> None:
            # The sum of the slices of block_r ranks of h becomes a high and a low half.
            _wait((there, barrier) for (_, _, there), barrier in zip(pieces, h_arrived, strict=True))
            slices = (h_smem.at[:, s].transpose((1, 0)) for s in range(splits))
            loads = (plgpu.load(one, layout=BY_ROW, optimized=False) for one in slices)
            total = functools.reduce(jnp.add, loads)  # [block_r, tokens]
            rank = base + k * block_r + plgpu.broadcasted_iota(jnp.int32, total.shape, 0, layout=BY_ROW)
            total = jnp.where((rank >= begin) & (rank < end), total, 0.0)
            high = total.astype(high_smem.dtype)
            high_smem.at[k].transpose((1, 0))[...] = high
            low_smem.at[k].transpose((1, 0))[...] = (total - high.astype(jnp.float32)).astype(low_smem.dtype)
            plgpu.commit_smem()

            @pl.when(k + 1 < k_steps)
            def _() -> None:
                issue_h(k + 1)

        @pl.loop(0, blocks)
        def _(block: jax.Array) -> None:
            def product(acc: Any) -> jax.Array:
                @pl.loop(0, k_steps)
                def _(k: jax.Array) -> None:
                    step = block * k_steps + k
                    stage = lax.rem(step, stages)

                    @pl.when(step + stages - 1 < steps)
                    def _() -> None:
                        issue(step + stages - 1)
                        plgpu.commit_smem()

                    _wait((is_live(k, i), barrier.at[stage]) for i, barrier in enumerate(b_arrived))
                    b = b_smem.at[stage].transpose((1, 0))  # [block_n, block_r]
                    plgpu.wgmma(acc, b, high_smem.at[k].transpose((1, 0)))
                    plgpu.wgmma(acc, b, low_smem.at[k].transpose((1, 0)))  # what the cast to high has lost
                    plgpu.wgmma_wait(0)  # every warp has read the stage
                    plgpu.commit_smem()

                return acc[...]  # [block_n, tokens]

            added = plgpu.layout_cast(pl.run_scoped(product, plgpu.ACC((block_n, tokens))), BY_ROW)
            slot = lax.rem(block, stages)
            _wait((there, barrier.at[slot]) for (_, _, there), barrier in zip(pieces, y_arrived, strict=True))
            y_block = y_smem.at[slot].transpose((1, 0))
            old = plgpu.load(y_block, layout=BY_ROW, optimized=False)
            y_block[...] = (old.astype(jnp.float32) + added).astype(y_smem.dtype)
            plgpu.commit_smem()
            for size, offset, there in pieces:

                @pl.when(there)
                def _(size: int = size, offset: jax.Array = offset) -> None:
                    plgpu.copy_smem_to_gmem(
                        y_smem.at[slot, pl.ds(offset, size)], y.at[pl.ds(first_row + offset, size), y_columns(block)]
                    )

            plgpu.wait_smem_to_gmem(0, wait_read_only=True)


def lora_expand(
    h: jax.Array, y: jax.Array, pool: jax.Array, pages: jax.Array, work: jax.Array, layout: LoraLayout, stack: Stack, *,
    tile_rows: int, plan: ExpandPlan, interpret: bool = False,
) -> jax.Array:  # fmt: skip
    """See `pallas_kernels.lora.api.lora_expand`; h is of `lora_shrink` above."""
    _check(pool, layout)
    return _expand_launch(h, y, pool, pages, work, layout, stack, _tokens(tile_rows), plan, interpret)


@functools.partial(jax.jit, static_argnums=range(5, 10))
def _expand_launch(
    h: jax.Array, y: jax.Array, pool: jax.Array, pages: jax.Array, work: jax.Array,
    layout: LoraLayout, stack: Stack, tokens: int, plan: ExpandPlan, interpret: bool,
) -> jax.Array:  # fmt: skip
    block_r = ceil_div(plan.block_r, ROWS) * ROWS
    block_n = _block("d_out", plan.block_n, layout.width, *stack.d_outs)
    span_n = ceil_div(plan.span_n, block_n) * block_n
    pieces = min(tokens, y.shape[0]).bit_length()
    max_rank = h.shape[2] // len(stack.projections)
    k_steps = ceil_div(max_rank + layout.page_size - 1, block_r)
    out = jax.new_ref(y)
    kernel = plgpu.kernel(
        functools.partial(_expand, layout=layout, stack=stack, span_n=span_n),
        kernel_name="lora_expand",
        grid=(work.shape[0], sum(ceil_div(d, span_n) for d in stack.d_outs)),
        grid_names=("tile", "span"),
        scratch_types=[
            *_buffers(
                ((tokens, h.shape[0], block_r), jnp.float32),
                ((k_steps, tokens, block_r), pool.dtype),
                ((k_steps, tokens, block_r), pool.dtype),
                ((plan.stages, block_r, block_n), pool.dtype),
                ((plan.stages, tokens, block_n), y.dtype),
            ),
            (plgpu.Barrier(),) * pieces,
            (plgpu.Barrier(num_barriers=plan.stages),) * (block_r // layout.page_size),
            (plgpu.Barrier(num_barriers=plan.stages),) * pieces,
        ],
        compiler_params=PARAMS,
        interpret=_interpreter(interpret),
    )
    kernel(h, pool, pages, work, out)
    return jax.freeze(out)


def _check(pool: jax.Array, layout: LoraLayout) -> None:
    """Raises NotImplementedError for what these kernels do not serve."""
    if pool.dtype not in (jnp.bfloat16, jnp.float16):
        raise NotImplementedError(f"mosaic_gpu LoRA: weights of {pool.dtype}; available: bfloat16, float16")
    if layout.page_size not in (8, 16, 32):
        raise NotImplementedError(f"mosaic_gpu LoRA: page_size {layout.page_size}; available: 8, 16, 32")
    device = devices.target()
    if device is not None and device.compute_capability != 90:
        raise NotImplementedError(f"mosaic_gpu LoRA: {device.name}; available: Hopper")


def _tokens(tile_rows: int) -> int:
    """Width of the product that a tile of `tile_rows` tokens needs."""
    if tile_rows > 248:
        raise NotImplementedError(f"mosaic_gpu LoRA: tiles of {tile_rows} rows; the limit is 248")
    return ceil_div(tile_rows, 8) * 8


def _block(name: str, block: int, *widths: int) -> int:
    """The largest power of two, at most `block`, that divides all of `widths`."""
    block = math.gcd(1 << block.bit_length() - 1, *widths)
    if block < SWIZZLE:
        raise NotImplementedError(f"mosaic_gpu LoRA: {name} and pool width {widths} must be multiples of {SWIZZLE}")
    return block


def _buffers(*types: tuple[tuple[int, ...], Any]) -> list[Any]:
    """Shared memory for arrays of `types`, (shape, dtype) each."""
    size = sum(math.prod(shape) * jnp.dtype(dtype).itemsize for shape, dtype in types)
    limit = devices.DEVICES["h200"].shared_bytes - 2048  # barriers, and each buffer's alignment
    if size > limit:
        raise NotImplementedError(
            f"mosaic_gpu LoRA: the plan needs {size} bytes of shared memory; the limit is {limit}"
        )
    return [plgpu.SMEM(shape, dtype) for shape, dtype in types]


def _interpreter(interpret: bool) -> Any:
    if not interpret:
        return False
    return plgpu.InterpretGPUParams(detect_races=True, out_of_bounds_reads="uninitialized")
