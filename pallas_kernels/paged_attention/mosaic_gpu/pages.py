"""Copies of pages into shared memory by a separate warpgroup, one tile `[page_size, head_dim]` at a time."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.paged_attention.mosaic_gpu.work import CONSUMERS
from pallas_kernels.paged_attention.plan import AttentionShape, MosaicGpuPlan

TILED = (plgpu.TilingTransform((8, 64)), plgpu.SwizzleTransform(128))  # type: ignore[abstract]
"""Shared-memory layout of 16-bit matrices for both TMA and the tensor core."""


def ring(shape: AttentionShape, plan: MosaicGpuPlan) -> tuple[Any, ...]:
    """Shared memory of the page pipeline: keys, values, and barriers (keys copied, values copied, stage consumed)."""
    buffer = plgpu.SMEM((plan.stages, plan.block_n, shape.head_dim), shape.dtype, transforms=TILED)
    ready = plgpu.Barrier(num_arrivals=plan.block_n // shape.page_size, num_barriers=plan.stages)
    return buffer, buffer, ready, ready, plgpu.Barrier(num_arrivals=CONSUMERS, num_barriers=plan.stages)


def copy_pages(pages: Any, tokens: Any, page_size: int, seq: Any, head: Any, keys: tuple[Any, Any], pipe: Any) -> None:
    """The producer: copies keys and values of tokens `keys = (begin, end)` of a sequence, one step per free stage. A
    step fills its stage; past the last needed page, it repeats that page. The four warps share a step's pages."""
    k_smem, v_smem, k_ready, v_ready, consumed = pipe
    stages, step_tokens, head_dim = k_smem.shape
    columns = pl.ds(head * head_dim, head_dim)
    per_step = step_tokens // page_size
    warps = min(4, per_step)
    begin, end = keys
    num_steps = steps(begin, end, step_tokens)

    def produce(warp: Any) -> None:
        first_page, last_page = lax.div(begin, page_size) + warp, lax.div(end - 1, page_size)

        def ids(step: Any) -> tuple[Any, ...]:
            first = first_page + step * per_step
            return tuple(pages[seq, jnp.minimum(first + j, last_page)] for j in range(0, per_step, warps))

        def copy(step: Any, page_ids: tuple[Any, ...]) -> tuple[Any, ...]:
            stage = lax.rem(step, stages)

            pl.when(step >= stages)(lambda: plgpu.barrier_wait(consumed.at[stage]))
            for smem, ready, tile in ((k_smem, k_ready, 0), (v_smem, v_ready, 1)):
                for j, page in enumerate(page_ids):
                    source = tokens.at[pl.ds((page * 2 + tile) * page_size, page_size), columns]
                    target = smem.at[stage, pl.ds((j * warps + warp) * page_size, page_size)]
                    plgpu.copy_gmem_to_smem(source, target, ready.at[stage])
            return ids(step + 1)  # the wait for a free stage hides its latency

        @pl.when((warp < warps) & (num_steps > 0))
        def _copy() -> None:
            lax.fori_loop(0, num_steps, copy, ids(0))

            @pl.loop(jnp.maximum(num_steps - stages, 0), num_steps)
            def _drain(step: Any) -> None:  # so that no barrier ends in an unobserved phase
                plgpu.barrier_wait(consumed.at[lax.rem(step, stages)])

    plgpu.warp_map(produce)


def steps(begin: Any, end: Any, step_tokens: int) -> Any:
    """Number of steps over the keys `begin .. end - 1`; zero or negative without keys."""
    return lax.div(end - begin + step_tokens - 1, step_tokens)


def clear_stale(v_smem: Any, live: Any) -> None:
    """Zeros a stage's values from row `live` on, where a page's previous owner may have left NaN (0 * NaN is NaN)."""
    row = plgpu.broadcasted_iota(jnp.int32, (64, 64), 0, layout=plgpu.Layout.WGMMA)

    @pl.loop(0, v_smem.shape[0] // 64)
    def _rows(r: Any) -> None:
        @pl.loop(0, v_smem.shape[1] // 64)
        def _columns(c: Any) -> None:
            part = v_smem.at[pl.ds(r * 64, 64), pl.ds(c * 64, 64)]
            values = plgpu.load(part, layout=plgpu.Layout.WGMMA)
            part[...] = jnp.where(row < live - r * 64, values, jnp.zeros_like(values))

    plgpu.commit_smem()
