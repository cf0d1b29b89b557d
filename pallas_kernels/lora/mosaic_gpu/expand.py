"""`y + h B` of every tile of the step, in place: the kernel and its launch."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.lora.layout import LoraLayout, Stack, ceil_div
from pallas_kernels.lora.mosaic_gpu.copies import BY_ROW, PARAMS, page_of, row_pieces, wait_for
from pallas_kernels.lora.mosaic_gpu.limits import ROWS, block_width, buffers, check_served, interpreter, product_width
from pallas_kernels.lora.plan import ExpandPlan


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
    pieces = row_pieces(rows, min(tokens, y.shape[0]))

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
                page, half = page_of(pages, slot, b_base + in_wide + in_narrow + chunk)
                plgpu.copy_gmem_to_smem(pool.at[page, half, :, pl.ds(column, block_n)], b_rows, b_arrived[i].at[stage])

            is_first_use = (step < stages) | (k_steps > 1)  # later these rows are still zero

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
            # Split the sum of the slices of block_r ranks of h into a high and a low half.
            wait_for((there, barrier) for (_, _, there), barrier in zip(pieces, h_arrived, strict=True))
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

                    wait_for((is_live(k, i), barrier.at[stage]) for i, barrier in enumerate(b_arrived))
                    b = b_smem.at[stage].transpose((1, 0))  # [block_n, block_r]
                    plgpu.wgmma(acc, b, high_smem.at[k].transpose((1, 0)))
                    plgpu.wgmma(acc, b, low_smem.at[k].transpose((1, 0)))  # the rounding error of high
                    plgpu.wgmma_wait(0)  # every warp has read the stage
                    plgpu.commit_smem()

                return acc[...]  # [block_n, tokens]

            added = plgpu.layout_cast(pl.run_scoped(product, plgpu.ACC((block_n, tokens))), BY_ROW)
            slot = lax.rem(block, stages)
            wait_for((there, barrier.at[slot]) for (_, _, there), barrier in zip(pieces, y_arrived, strict=True))
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
    check_served(pool, layout)
    return _expand_launch(h, y, pool, pages, work, layout, stack, product_width(tile_rows), plan, interpret)


@functools.partial(jax.jit, static_argnums=range(5, 10))
def _expand_launch(
    h: jax.Array, y: jax.Array, pool: jax.Array, pages: jax.Array, work: jax.Array,
    layout: LoraLayout, stack: Stack, tokens: int, plan: ExpandPlan, interpret: bool,
) -> jax.Array:  # fmt: skip
    block_r = ceil_div(plan.block_r, ROWS) * ROWS
    block_n = block_width("d_out", plan.block_n, layout.width, *stack.d_outs)
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
            *buffers(
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
        interpret=interpreter(interpret),
    )
    kernel(h, pool, pages, work, out)
    return jax.freeze(out)
