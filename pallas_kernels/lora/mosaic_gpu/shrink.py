"""`x A` of every tile of the step: the kernel and its launch."""

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
from pallas_kernels.lora.plan import ShrinkPlan


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
                page, half = page_of(pages, slot, a_base + row_block * layout.a_chunks(stack) + chunk)
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
                    wait_for((is_live(block, i), barrier.at[stage]) for i, barrier in enumerate(a_arrived))
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
            for size, offset, there in row_pieces(rows, min(window, h.shape[1])):

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
    """See `pallas_kernels.lora.api.lora_shrink`. Rank j of h is row j of the stack; its last axis is rounded up to the
    plan's block_r."""
    check_served(pool, layout)
    return _shrink_launch(x, pool, pages, work, layout, stack, max_rank, product_width(tile_rows), plan, interpret)


@functools.partial(jax.jit, static_argnums=range(4, 10))  # one kernel for all layers
def _shrink_launch(
    x: jax.Array, pool: jax.Array, pages: jax.Array, work: jax.Array,
    layout: LoraLayout, stack: Stack, max_rank: int, tokens: int, plan: ShrinkPlan, interpret: bool,
) -> jax.Array:  # fmt: skip
    num_rows = x.shape[0]
    x = jnp.pad(x, ((0, -num_rows % 8), (0, 0)))
    block_r = ceil_div(plan.block_r, ROWS) * ROWS
    block_k = block_width("d_in", plan.block_k, layout.width, stack.d_in)
    slice_k = ceil_div(plan.slice_k, block_k) * block_k
    splits = ceil_div(stack.d_in, slice_k)
    window = min(tokens + 8, x.shape[0])
    stages = max(plan.stages, 2)  # a stage is refilled one step after it is read
    kernel = plgpu.kernel(
        functools.partial(_shrink, layout=layout, stack=stack, slice_k=slice_k),
        kernel_name="lora_shrink",
        out_type=jax.ShapeDtypeStruct(
            (splits, num_rows, ceil_div(len(stack.projections) * max_rank, block_r) * block_r), jnp.float32
        ),
        grid=(work.shape[0], splits),
        grid_names=("tile", "part"),
        scratch_types=[
            *buffers(
                ((stages, block_r, block_k), pool.dtype),
                ((stages, window, block_k), pool.dtype),
                ((window, block_r), jnp.float32),
            ),
            (plgpu.Barrier(num_barriers=stages),) * (block_r // layout.page_size),
            plgpu.Barrier(num_barriers=stages),
        ],
        compiler_params=PARAMS,
        interpret=interpreter(interpret),
    )
    return kernel(x.astype(pool.dtype), pool, pages, work)
