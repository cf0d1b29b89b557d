"""Decode attention (every sequence has one row): flash-decoding.

Contexts are split into chunks of one length; a block computes one chunk for one KV head, and a second, small launch
merges the chunks, because Mosaic GPU has no tested way to identify a sequence's last block (the Triton backend needs
one launch). The operands are swapped: the tensor core's 64 rows are tokens, and its columns the few query heads of a
group.
"""

from __future__ import annotations

from functools import partial
from math import gcd
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.lora.layout import ceil_div
from pallas_kernels.paged_attention.mosaic_gpu.pages import TILED, clear_stale, copy_pages, ring, steps
from pallas_kernels.paged_attention.mosaic_gpu.softmax import (
    COMPILER,
    LOG2_E,
    MASKED,
    PER_COLUMN,
    WGMMA,
    along,
    full,
    product,
)
from pallas_kernels.paged_attention.mosaic_gpu.work import MosaicWork
from pallas_kernels.paged_attention.plan import AttentionShape, MosaicGpuPlan


def attend_decode(
    q: jax.Array,
    tokens: jax.Array,
    pages: jax.Array,
    work: MosaicWork,
    shape: AttentionShape,
    plan: MosaicGpuPlan,
    interpret: Any,
) -> jax.Array:
    """One layer's attention, shaped as q `[T, H, head_dim]`. tokens: the pool as `[2 * num_pages * page_size, W]`.
    pages: int32 `[S, max_pages]`. interpret: None, or `plgpu.InterpretGPUParams`."""
    rows, num_heads, head_dim = q.shape
    group, step_tokens = shape.group, plan.block_n
    # A block reads query rows `[T * H, head_dim]` in aligned windows that hold a group wherever it begins.
    columns = ceil_div(8 - gcd(group, 8) + group, 8) * 8
    heads = q.reshape(rows * num_heads, head_dim)
    if spare := max(-heads.shape[0] % 8, columns - heads.shape[0]):
        heads = jnp.pad(heads, ((0, spare), (0, 0)))

    def window(row: Any, head: Any) -> tuple[Any, Any]:
        """The first query rows of a group and of its window."""
        first = row * num_heads + head * group
        return first, jnp.minimum(lax.div(first, 8) * 8, heads.shape[0] - columns)

    def paged_attention_decode(*refs: Any) -> None:
        items, pages, tokens, heads, acc_out, stat_out, q_smem, p_smem, q_ready, *pipe = refs
        item, head, warpgroup = (lax.axis_index(name) for name in ("item", "head", "warpgroup"))
        seq, row, seen, begin, end = (items[item, field] for field in range(5))

        @pl.when((warpgroup == 1) & (end > begin))
        def _produce() -> None:
            copy_pages(pages, tokens, shape.page_size, seq, head, (begin, end), pipe)

        @pl.when((warpgroup == 0) & (end > begin))
        def _consume() -> None:
            k_smem, v_smem, k_ready, v_ready, consumed = pipe
            plgpu.copy_gmem_to_smem(heads.at[pl.ds(window(row, head)[1], columns)], q_smem, q_ready)
            plgpu.barrier_wait(q_ready)
            token = plgpu.broadcasted_iota(jnp.int32, (step_tokens, columns), 0, layout=WGMMA)

            def attend(step: Any, state: tuple[Any, Any, Any]) -> tuple[Any, Any, Any]:
                highest, total, acc = state
                stage, first = lax.rem(step, k_smem.shape[0]), begin + step * step_tokens
                plgpu.barrier_wait(k_ready.at[stage])
                scores = product(token.shape, k_smem.at[stage], q_smem.transpose((1, 0)))
                live = (token >= seen - first) & (token < end - first)
                scores = jnp.where(live, scores * (head_dim**-0.5 * LOG2_E), MASKED)
                new = jnp.maximum(highest, scores.max(axis=0))
                decay, p = jnp.exp2(highest - new), jnp.exp2(scores - along(new, 1, scores.shape))
                p_smem.transpose((1, 0))[...] = p.astype(p_smem.dtype)
                plgpu.commit_smem()
                plgpu.barrier_wait(v_ready.at[stage])

                @pl.when(first + step_tokens > end)
                def _clear() -> None:
                    clear_stale(v_smem.at[stage], end - first)

                pv = product(acc.shape, v_smem.at[stage].transpose((1, 0)), p_smem.transpose((1, 0)))
                plgpu.barrier_arrive(consumed.at[stage])
                return new, total * along(decay, 1, p.shape) + p, acc * along(decay, 1, acc.shape) + pv

            totals, acc = full(token.shape, 0, WGMMA), full((head_dim, columns), 0, WGMMA)
            state = (full((columns,), MASKED, PER_COLUMN), totals, acc)
            highest, totals, acc = lax.fori_loop(0, steps(begin, end, step_tokens), attend, state)
            acc_out.at[item, head][...] = acc
            stat_out.at[item, head, 0][...] = highest
            stat_out.at[item, head, 1][...] = totals.sum(axis=0)

    parts = (work.items.shape[0], shape.num_kv_heads)
    acc, stat = plgpu.kernel(
        paged_attention_decode,
        out_type=[jax.ShapeDtypeStruct((*parts, n, columns), jnp.float32) for n in (head_dim, 2)],
        scratch_types=(
            plgpu.SMEM((columns, head_dim), q.dtype, transforms=TILED),
            plgpu.SMEM((columns, step_tokens), q.dtype, transforms=TILED),
            plgpu.Barrier(),
            *ring(shape, plan, consumers=1),
        ),
        grid=parts,
        grid_names=("item", "head"),
        num_threads=2,
        thread_name="warpgroup",
        compiler_params=COMPILER,
        interpret=interpret,
    )(work.items, pages, tokens, heads)

    def paged_attention_merge(row_items: Any, accs: Any, stats: Any, out: Any, o_smem: Any) -> None:
        row, head = lax.axis_index("row"), lax.axis_index("head")
        first_item, count = row_items[row, 0], row_items[row, 1]

        def merge(i: Any, state: tuple[Any, Any, Any]) -> tuple[Any, Any, Any]:
            highest, total, acc = state
            load = partial(plgpu.load, optimized=False)
            theirs, their_total = (load(stats.at[first_item + i, head, n], layout=PER_COLUMN) for n in (0, 1))
            new = jnp.maximum(highest, theirs)
            mine, its = jnp.exp2(highest - new), jnp.exp2(theirs - new)
            their_acc = load(accs.at[first_item + i, head], layout=WGMMA)
            acc = acc * along(mine, 1, acc.shape) + their_acc * along(its, 1, acc.shape)
            return new, total * mine + their_total * its, acc

        state = (full((columns,), MASKED, PER_COLUMN), full((columns,), 0, PER_COLUMN))
        _, total, acc = lax.fori_loop(0, count, merge, (*state, full((head_dim, columns), 0, WGMMA)))
        norm = 1 / jnp.maximum(total, 1e-30)  # a row without a sequence has no items: zeros
        o_smem.transpose((1, 0))[...] = (acc * along(norm, 1, acc.shape)).astype(o_smem.dtype)
        plgpu.commit_smem()
        first, base = window(row, head)
        plgpu.copy_smem_to_gmem(o_smem.at[pl.ds(first - base, group)], out.at[pl.ds(first, group)])
        plgpu.wait_smem_to_gmem(0)

    out = plgpu.kernel(
        paged_attention_merge,
        out_type=jax.ShapeDtypeStruct((rows * num_heads, head_dim), q.dtype),
        scratch_types=(plgpu.SMEM((columns, head_dim), q.dtype),),
        grid=(rows, shape.num_kv_heads),
        grid_names=("row", "head"),
        compiler_params=COMPILER,
        interpret=interpret,
    )(work.row_items, acc, stat)
    return out.reshape(q.shape)
