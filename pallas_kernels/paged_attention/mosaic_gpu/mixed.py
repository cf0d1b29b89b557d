"""Attention of a step with prefill, and possibly decode rows, in one launch.

A block computes `R` rows of one sequence times the heads of a group, packed to 64 rows per warpgroup, over the
sequence's keys up to its last row. TMA tiles are aligned, so blocks begin at multiples of `R` rows of the step; rows of
other sequences are computed but not stored.
"""

from __future__ import annotations

from functools import partial
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
    PER_ROW,
    WGMMA,
    along,
    full,
    product,
)
from pallas_kernels.paged_attention.mosaic_gpu.work import CONSUMERS, block_rows
from pallas_kernels.paged_attention.plan import AttentionShape, MosaicGpuPlan


def attend_mixed(
    q: jax.Array,
    tokens: jax.Array,
    pages: jax.Array,
    items: jax.Array,
    shape: AttentionShape,
    plan: MosaicGpuPlan,
    interpret: Any,
) -> jax.Array:
    """One layer's attention, shaped as q `[T, H, head_dim]`. tokens: the pool as `[2 * num_pages * page_size, W]`.
    pages: int32 `[S, max_pages]`. items: of `mixed_work`. interpret: None, or `plgpu.InterpretGPUParams`."""
    num_rows, _, head_dim = q.shape
    group, window, step_tokens = shape.group, shape.window, plan.block_n
    rows = block_rows(group)
    part = min(rows, 64)  # rows of one head in one warpgroup
    scale = head_dim**-0.5 * LOG2_E
    queries = q.reshape(num_rows, -1)
    if spare := ceil_div(shape.max_rows, rows) * rows - num_rows:
        queries = jnp.pad(queries, ((0, spare), (0, 0)))

    def paged_attention_mixed(*refs: Any) -> None:
        items, pages, tokens, queries, out, qo_smem, p_smem, q_ready, cleared, attended, *pipe = refs
        item, head, warpgroup = (lax.axis_index(name) for name in ("item", "head", "warpgroup"))
        seq, block, own_first, own_last, shift, live = (items[item, field] for field in range(6))
        end = jnp.minimum(own_last + shift, live)
        begin = jnp.maximum(own_first + shift + 1 - window, 0) if window else jnp.int32(0)
        begin = lax.div(begin, step_tokens) * step_tokens

        def part_of(p: int) -> tuple[Any, Any, Any]:
            """A warpgroup's part `p`: its head in the group, the head's columns of a row, its first row."""
            first = warpgroup * 64 + p * part
            member = lax.div(first, rows)
            column = (head * group + jnp.minimum(member, group - 1)) * head_dim
            return member, pl.ds(column, head_dim), lax.rem(first, rows)

        @pl.when(warpgroup == CONSUMERS)
        def _produce() -> None:
            plgpu.set_max_registers(40, action="decrease")  # 40 + 2 * 232 = 3 * 168, what the launch has
            copy_pages(pages, tokens, shape.page_size, seq, head, (begin, end), pipe)

        @pl.when((warpgroup < CONSUMERS) & (own_last > own_first))
        def _consume() -> None:
            plgpu.set_max_registers(232, action="increase")
            k_smem, v_smem, k_ready, v_ready, consumed = pipe
            q_smem, o_smem = qo_smem
            for p in range(64 // part):
                _, columns, first = part_of(p)
                source = queries.at[pl.ds(pl.multiple_of(block + first, 8), part), columns]
                plgpu.copy_gmem_to_smem(source, q_smem.at[warpgroup, pl.ds(p * part, part)], q_ready.at[warpgroup])
            plgpu.barrier_wait(q_ready.at[warpgroup])

            def attend(step: Any, state: tuple[Any, Any, Any], masked: bool) -> tuple[Any, Any, Any]:
                highest, total, acc = state
                stage, first = lax.rem(step, k_smem.shape[0]), begin + step * step_tokens
                plgpu.barrier_wait(k_ready.at[stage])
                scores = product((64, step_tokens), q_smem.at[warpgroup], k_smem.at[stage].transpose((1, 0)))
                if masked:
                    row = plgpu.broadcasted_iota(jnp.int32, (64,), 0, layout=PER_ROW) + warpgroup * 64
                    newest = along((row & (rows - 1)) + (block + shift - first), 0, scores.shape)
                    key = plgpu.broadcasted_iota(jnp.int32, scores.shape, 1, layout=WGMMA)
                    seen = (key <= newest) & (key > newest - window) if window else key <= newest
                    scores = jnp.where(seen, scores, MASKED)
                new = jnp.maximum(highest, scores.max(axis=1) * scale)
                decay = jnp.exp2(highest - new)
                weights = jnp.exp2(scores * scale - along(new, 0, scores.shape))
                total = total * decay + weights.sum(axis=1)
                weights = weights.astype(q.dtype)
                plgpu.barrier_wait(v_ready.at[stage])
                if masked:
                    stale = first + step_tokens > live

                    @pl.when(stale & (warpgroup == 0))
                    def _clear() -> None:
                        clear_stale(v_smem.at[stage], live - first)
                        plgpu.barrier_arrive(cleared)

                    pl.when(stale)(lambda: plgpu.barrier_wait(cleared))
                acc *= along(decay, 0, acc.shape)
                if interpret:  # the interpreter supports neither register operands nor `run_state`
                    p_smem.at[warpgroup][...] = weights
                    acc += product(acc.shape, p_smem.at[warpgroup], v_smem.at[stage])
                else:
                    acc = pl.run_state(lambda ref: plgpu.wgmma(ref, weights, v_smem.at[stage]))(plgpu.ACC.init(acc))
                plgpu.barrier_arrive(consumed.at[stage])
                return new, total, acc

            state = (full((64,), MASKED, PER_ROW), full((64,), 0, PER_ROW), full((64, head_dim), 0, WGMMA))
            num_steps, unmasked = steps(begin, end, step_tokens), jnp.int32(0)
            if not window:
                unmasked = jnp.minimum(lax.div(own_first + shift + 1, step_tokens), num_steps)
                state = lax.fori_loop(0, unmasked, partial(attend, masked=False), state)
            _, total, acc = lax.fori_loop(unmasked, num_steps, partial(attend, masked=True), state)

            plgpu.barrier_arrive(attended)
            plgpu.barrier_wait(attended)  # queries and output share memory
            norm = 1 / jnp.maximum(total, 1e-30)  # rows without a sequence have no keys: zeros
            o_smem.at[warpgroup][...] = (acc * along(norm, 0, acc.shape)).astype(o_smem.dtype)
            plgpu.commit_smem()
            for p in range(64 // part):
                member, columns, first = part_of(p)
                own = jnp.maximum(own_first - block - first, 0), jnp.minimum(own_last - block - first, part)

                def store(row: Any, count: int, p: int = p, columns: Any = columns, first: Any = first) -> None:
                    target = out.at[pl.ds(block + first + row, count), columns]
                    plgpu.copy_smem_to_gmem(o_smem.at[warpgroup, pl.ds(p * part + row, count)], target)

                whole = own[1] - own[0] == part
                pl.when(whole & (member < group))(partial(store, 0, part))

                @pl.when(jnp.logical_not(whole) & (member < group))
                def _store_rows(own: tuple[Any, Any] = own, store: Any = store) -> None:
                    lax.fori_loop(*own, lambda row, _: store(row, 1), None)

            plgpu.wait_smem_to_gmem(0)

    packed = (CONSUMERS, 64, head_dim)
    out = plgpu.kernel(
        paged_attention_mixed,
        out_type=jax.ShapeDtypeStruct(queries.shape, q.dtype),
        scratch_types=(
            plgpu.RefUnion(plgpu.SMEM(packed, q.dtype, transforms=TILED), plgpu.SMEM(packed, q.dtype)),
            plgpu.SMEM((CONSUMERS, 64, step_tokens), q.dtype, transforms=TILED) if interpret else None,
            plgpu.Barrier(num_arrivals=64 // part, num_barriers=CONSUMERS),
            plgpu.Barrier(),
            plgpu.Barrier(num_arrivals=CONSUMERS),
            *ring(shape, plan),
        ),
        grid=(items.shape[0], shape.num_kv_heads),
        grid_names=("item", "head"),
        num_threads=CONSUMERS + 1,
        thread_name="warpgroup",
        compiler_params=COMPILER,
        interpret=interpret,
    )(items, pages, tokens, queries)
    return out[:num_rows].reshape(q.shape)
