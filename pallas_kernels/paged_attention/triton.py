"""Paged attention in Triton: Ampere, Ada, Hopper. One launch for a layer's decode rows and prefill tiles.

The grid is persistent: it has as many programs as reside on the device at once, and they take pairs of a work item and
a key-value head, the most expensive first, until none is left (`work.work_table`). A *decode* item is a chunk of one
sequence's context, for all query heads of the key-value head: K and V are read once. Chunks of a sequence
(flash-decoding) leave partial results; the program that finishes last adds them in a fixed order. So the bits depend on
neither the order nor the program of an item. A *prefill* item is a tile of rows, packed with the query heads of one
key-value head, over the keys up to its last row. Softmax is in base 2, with the scale folded into its argument. Token
indices are clamped to the sequence, so only live tokens are read.
"""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
import triton
import triton.language as tl

from pallas_kernels import devices
from pallas_kernels.kv_format import LayerPool, ScaledPages, pages_of
from pallas_kernels.paged_attention.plan import AttentionShape, TritonPlan, triton_plan
from pallas_kernels.paged_attention.tiles import AttentionTiles
from pallas_kernels.paged_attention.work import FIELDS, WorkShape, work_table
from pallas_kernels.triton_call import triton_call

MASKED = tl.constexpr(-(2.0**100))
"""Score of a key that a query must not see: finite, so that a row without a visible key in a block leaves no NaN, and a
power of two, so that its product with the scale is exact, also where it becomes part of a fused multiply-add."""

MOST_GROUP = 64
"""Most query heads per key-value head: the rows of the smallest prefill block."""


@triton.jit
def _tokens(start, first, end, BLOCK_N: tl.constexpr):
    """The `BLOCK_N` tokens from `start` on, clamped to the live range `first .. end - 1`."""
    return tl.maximum(tl.minimum(start + tl.arange(0, BLOCK_N), end - 1), first)


@triton.jit
def _blocks(
    acc, top, total, q, position, pool_ptr, scales_ptr, table_ptr, first, start, stop, end,
    SCALE: tl.constexpr, HEAD_DIM: tl.constexpr, WIDTH: tl.constexpr, PAGE_SIZE: tl.constexpr, WINDOW: tl.constexpr,
    CAP: tl.constexpr, KV: tl.constexpr, BLOCK_N: tl.constexpr, STAGES: tl.constexpr, CAUSAL: tl.constexpr,
):  # fmt: skip
    """Online softmax over the keys `start .. stop - 1`, `BLOCK_N` per iteration.

    Args:
      acc, top, total: the state: weighted sum `[M, HEAD_DIM]`, highest score `[M]`, sum of weights `[M]`.
      first, end: keys `first .. end - 1` may be read.
      SCALE: of a score, for base 2.
      CAP: 0, or the factor of a score in the exponent of its tanh, for base 2; then SCALE applies to the tanh.
      KV: see `paged_attention_kernel`.
      CAUSAL: rows see only keys up to `position [M]`; otherwise all.
    """
    column = tl.arange(0, HEAD_DIM)
    page = tl.load(table_ptr + _tokens(start, first, end, BLOCK_N) // PAGE_SIZE)
    for n in tl.range(start, stop, BLOCK_N, num_stages=STAGES):
        row = page.to(tl.int64) * (2 * PAGE_SIZE) + _tokens(n, first, end, BLOCK_N) % PAGE_SIZE
        keys = pool_ptr + (row * WIDTH)[:, None] + column[None, :]
        # The next block's pages are looked up one step ahead, so that no copy waits for the page table.
        page = tl.load(table_ptr + _tokens(n + BLOCK_N, first, end, BLOCK_N) // PAGE_SIZE)
        k = tl.load(keys)
        if KV != "":
            k = k.to(q.dtype)  # exact
        scores = tl.dot(q, tl.trans(k))
        if KV == "int8":
            scale = scales_ptr + row * (WIDTH // HEAD_DIM)
            scores *= tl.load(scale).to(tl.float32)[None, :]
        if CAP > 0:
            scores = 1 - 2 / (tl.exp2(tl.minimum(scores * CAP, 64.0)) + 1)  # tanh
        if CAUSAL:
            key = n + tl.arange(0, BLOCK_N)
            seen = key[None, :] <= position[:, None]
            if WINDOW > 0:
                seen &= key[None, :] > position[:, None] - WINDOW
            scores = tl.where(seen, scores, MASKED)
        highest = tl.maximum(top, tl.max(scores, 1))
        p = tl.exp2(scores * SCALE - (highest * SCALE)[:, None])
        decay = tl.exp2((top - highest) * SCALE)
        v = tl.load(keys + PAGE_SIZE * WIDTH)
        if KV != "":
            v = v.to(q.dtype)
        weights = p
        if KV == "int8":
            weights = p * tl.load(scale + PAGE_SIZE * (WIDTH // HEAD_DIM)).to(tl.float32)[None, :]
        acc = tl.dot(weights.to(v.dtype), v, acc * decay[:, None])
        total = total * decay + tl.sum(p, 1)
        top = highest
    return acc, top, total


@triton.jit
def _tile(work, head, GROUP: tl.constexpr, HEADS: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_M: tl.constexpr):
    """Offsets in q and out of a prefill item's rows, the heads of a group side by side `[M, HEAD_DIM]`, and the mask of
    its own rows `[M, 1]`. Loads are volatile, so that no register holds them between two calls."""
    row, rows = tl.load(work, volatile=True), tl.load(work + 1, volatile=True)
    m = tl.arange(0, BLOCK_M)
    offset = ((row + m // GROUP) * HEADS + head * GROUP + m % GROUP).to(tl.int64) * HEAD_DIM
    return offset[:, None] + tl.arange(0, HEAD_DIM)[None, :], (m // GROUP < rows)[:, None]


# Not inlined, like `_decode`: ptxas would keep what does not depend on the item in registers over the whole loop.
@triton.jit(noinline=True)
def _prefill(
    q_ptr, pool_ptr, scales_ptr, table_ptr, work, out_ptr, head, begin, end,
    SCALE: tl.constexpr, GROUP: tl.constexpr, HEADS: tl.constexpr, HEAD_DIM: tl.constexpr, WIDTH: tl.constexpr,
    PAGE_SIZE: tl.constexpr, WINDOW: tl.constexpr, CAP: tl.constexpr, KV: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """A tile of rows, at the positions `begin .. end - 1`, for the query heads of one key-value head."""
    offset, own = _tile(work, head, GROUP, HEADS, HEAD_DIM, BLOCK_M)
    q = tl.load(q_ptr + offset, mask=own, other=0.0)
    if KV == "":
        q = q.to(pool_ptr.dtype.element_ty)
    position = begin + tl.arange(0, BLOCK_M) // GROUP
    top = tl.full([BLOCK_M], MASKED, tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    acc = tl.zeros([BLOCK_M, HEAD_DIM], tl.float32)
    if WINDOW > 0:
        first = tl.maximum(begin - WINDOW + 1, 0)
        masked = first // BLOCK_N * BLOCK_N
    else:  # the blocks before the first row's are seen by all rows
        first = 0
        masked = (begin + 1) // BLOCK_N * BLOCK_N
        acc, top, total = _blocks(
            acc, top, total, q, position, pool_ptr, scales_ptr, table_ptr, first, 0, masked, end,
            SCALE, HEAD_DIM, WIDTH, PAGE_SIZE, WINDOW, CAP, KV, BLOCK_N, STAGES, False,
        )  # fmt: skip
    acc, top, total = _blocks(
        acc, top, total, q, position, pool_ptr, scales_ptr, table_ptr, first, masked, end, end,
        SCALE, HEAD_DIM, WIDTH, PAGE_SIZE, WINDOW, CAP, KV, BLOCK_N, STAGES, True,
    )  # fmt: skip
    offset, own = _tile(work, head, GROUP, HEADS, HEAD_DIM, BLOCK_M)
    tl.store(out_ptr + offset, (acc / total[:, None]).to(out_ptr.dtype.element_ty), mask=own)


@triton.jit(noinline=True)
def _decode(
    q_ptr, pool_ptr, scales_ptr, table_ptr, out_ptr, partial_ptr, stats_ptr, arrivals_ptr, head, item, row, begin, end,
    part, parts,
    SCALE: tl.constexpr, GROUP: tl.constexpr, HEADS: tl.constexpr, HEAD_DIM: tl.constexpr, WIDTH: tl.constexpr,
    PAGE_SIZE: tl.constexpr, CAP: tl.constexpr, KV: tl.constexpr, BLOCK_N: tl.constexpr, STAGES: tl.constexpr,
    BLOCK_G: tl.constexpr, BLOCK_P: tl.constexpr,
):  # fmt: skip
    """One row's query heads of one key-value head over the keys `begin .. end - 1`."""
    M: tl.constexpr = max(BLOCK_G, 16)  # rows of a tensor-core product
    g = tl.arange(0, M)
    own = g < GROUP
    column = tl.arange(0, HEAD_DIM)
    q_head = head * GROUP + g
    address = (row.to(tl.int64) * HEADS + q_head)[:, None] * HEAD_DIM + column[None, :]
    q = tl.load(q_ptr + address, mask=own[:, None], other=0.0)
    if KV == "":
        q = q.to(pool_ptr.dtype.element_ty)
    top = tl.full([M], MASKED, tl.float32)
    total = tl.zeros([M], tl.float32)
    acc = tl.zeros([M, HEAD_DIM], tl.float32)
    acc, top, total = _blocks(
        acc, top, total, q, tl.full([M], 0, tl.int32) + (end - 1), pool_ptr, scales_ptr, table_ptr, begin, begin, end,
        end, SCALE, HEAD_DIM, WIDTH, PAGE_SIZE, 0, CAP, KV, BLOCK_N, STAGES, True,
    )  # fmt: skip
    if parts == 1:
        tl.store(out_ptr + address, (acc / total[:, None]).to(out_ptr.dtype.element_ty), mask=own[:, None])
    else:
        mine = item * HEADS + q_head
        tl.store(partial_ptr + mine.to(tl.int64)[:, None] * HEAD_DIM + column[None, :], acc, mask=own[:, None])
        tl.store(stats_ptr + mine * 2, top, mask=own)
        tl.store(stats_ptr + mine * 2 + 1, total, mask=own)
        tl.debug_barrier()  # all threads have written their part before one signals it
        if tl.atomic_add(arrivals_ptr, 1, sem="acq_rel") == parts - 1:
            tl.store(arrivals_ptr, 0)  # for the next layer
            _add_up(
                out_ptr + (row.to(tl.int64) * HEADS + head * GROUP) * HEAD_DIM, partial_ptr, stats_ptr,
                (item - part) * HEADS + head * GROUP, parts, SCALE, GROUP, HEADS, HEAD_DIM, BLOCK_G, BLOCK_P,
            )  # fmt: skip


@triton.jit
def _add_up(
    out_ptr, partial_ptr, stats_ptr, first, parts,
    SCALE: tl.constexpr, GROUP: tl.constexpr, HEADS: tl.constexpr, HEAD_DIM: tl.constexpr,
    BLOCK_G: tl.constexpr, BLOCK_P: tl.constexpr,
):  # fmt: skip
    """Adds the partial results of one sequence and key-value head, `BLOCK_P` at a time; `first`: index of the first."""
    g = tl.arange(0, BLOCK_G)
    column = tl.arange(0, HEAD_DIM)
    top = tl.full([BLOCK_G], MASKED, tl.float32)
    total = tl.zeros([BLOCK_G], tl.float32)
    acc = tl.zeros([BLOCK_G, HEAD_DIM], tl.float32)
    for p in range(0, parts, BLOCK_P):
        part = p + tl.arange(0, BLOCK_P)
        live = (part < parts)[:, None] & (g < GROUP)[None, :]  # [P, G]
        at = first + part[:, None] * HEADS + g[None, :]
        # Written by other programs: bypass this multiprocessor's cache.
        tops = tl.load(stats_ptr + at * 2, mask=live, other=MASKED, cache_modifier=".cg")
        totals = tl.load(stats_ptr + at * 2 + 1, mask=live, other=0.0, cache_modifier=".cg")
        accs = tl.load(
            partial_ptr + at.to(tl.int64)[:, :, None] * HEAD_DIM + column[None, None, :],
            mask=live[:, :, None], other=0.0, cache_modifier=".cg",
        )  # fmt: skip
        highest = tl.maximum(top, tl.max(tops, 0))
        decay = tl.exp2((top - highest) * SCALE)
        weight = tl.exp2((tops - highest[None, :]) * SCALE)
        acc = acc * decay[:, None] + tl.sum(accs * weight[:, :, None], 0)
        total = total * decay + tl.sum(totals * weight, 0)
        top = highest
    address = g[:, None] * HEAD_DIM + column[None, :]
    tl.store(out_ptr + address, (acc / total[:, None]).to(out_ptr.dtype.element_ty), mask=(g < GROUP)[:, None])


@triton.jit
def _num_items(work_ptr):
    """Numbers of prefill and decode items. Loads are volatile, so that no register holds them while an item runs."""
    num_prefill = tl.load(work_ptr + 8, volatile=True)
    return num_prefill, tl.load(work_ptr + 9, volatile=True)


@triton.jit
def paged_attention_kernel(
    q_ptr, pool_ptr, pages_ptr, work_ptr, counters_in_ptr, scales_ptr, out_ptr, counters_ptr, partial_ptr, stats_ptr,
    T: tl.constexpr, SCALE: tl.constexpr, GROUP: tl.constexpr, HEADS: tl.constexpr, HEAD_DIM: tl.constexpr,
    PAGE_SIZE: tl.constexpr, MAX_PAGES: tl.constexpr, WINDOW: tl.constexpr, CAP: tl.constexpr, KV: tl.constexpr,
    FIELDS: tl.constexpr,
    PREFILL_ITEMS: tl.constexpr, ROW: tl.constexpr,
    PREFILL_M: tl.constexpr, PREFILL_N: tl.constexpr, PREFILL_STAGES: tl.constexpr,
    BLOCK_N: tl.constexpr, STAGES: tl.constexpr, BLOCK_G: tl.constexpr, BLOCK_P: tl.constexpr,
):  # fmt: skip
    """Pairs of a work item and a key-value head: the program's first is its own number, the next come from a counter.
    Prefill items are first, because they take longest. KV: "fp8", "int8" with scales, or "" for the pool's dtype."""
    if KV == "fp8":
        pool_ptr = pool_ptr.to(tl.pointer_type(tl.float8e4nv))
    if KV == "int8":
        pool_ptr = pool_ptr.to(tl.pointer_type(tl.int8))
    program, programs = tl.program_id(0), tl.num_programs(0)
    KV_HEADS: tl.constexpr = HEADS // GROUP
    WIDTH: tl.constexpr = KV_HEADS * HEAD_DIM
    num_rows = tl.load(work_ptr + 7)
    num_prefill, num_decode = _num_items(work_ptr)

    # Zeros in this program's share of the step's rows without a sequence.
    column = tl.arange(0, ROW)
    for t in range(num_rows + program, T, programs):
        tl.store(out_ptr + tl.cast(t, tl.int64) * (HEADS * HEAD_DIM) + column,
                 tl.zeros([ROW], out_ptr.dtype.element_ty), mask=column < HEADS * HEAD_DIM)  # fmt: skip

    pair = program
    live = pair < (num_prefill + num_decode) * KV_HEADS
    while live:
        item, head = pair // KV_HEADS, pair % KV_HEADS
        decode_item = item - num_prefill
        work = work_ptr + tl.where(decode_item < 0, item, PREFILL_ITEMS + decode_item) * FIELDS
        seq, begin, end = tl.load(work + 2), tl.load(work + 3), tl.load(work + 4)
        pool_head, scales_head = pool_ptr + head * HEAD_DIM, scales_ptr + head
        table_ptr = pages_ptr + seq * MAX_PAGES
        if PREFILL_ITEMS > 0:
            if decode_item < 0:
                _prefill(
                    q_ptr, pool_head, scales_head, table_ptr, work, out_ptr, head, begin, end,
                    SCALE, GROUP, HEADS, HEAD_DIM, WIDTH, PAGE_SIZE, WINDOW, CAP, KV, PREFILL_M,
                    PREFILL_N, PREFILL_STAGES,
                )  # fmt: skip
        if decode_item >= 0:
            _decode(
                q_ptr, pool_head, scales_head, table_ptr, out_ptr, partial_ptr, stats_ptr,
                counters_ptr + 1 + seq * KV_HEADS + head, head, decode_item, tl.load(work), begin, end,
                tl.load(work + 5), tl.load(work + 6),
                SCALE, GROUP, HEADS, HEAD_DIM, WIDTH, PAGE_SIZE, CAP, KV, BLOCK_N, STAGES, BLOCK_G, BLOCK_P,
            )  # fmt: skip
        num_prefill, num_decode = _num_items(work_ptr)
        pairs = (num_prefill + num_decode) * KV_HEADS
        pair = pairs
        if pairs > programs:
            taken = tl.atomic_add(counters_ptr, 1, sem="relaxed")
            if taken == pairs - 1:  # each pair adds one, so this was the last
                tl.store(counters_ptr, 0)  # for the next layer
            pair = programs + taken
        live = pair < pairs


class Attention:
    """The Triton implementation of `PagedAttention`, for one step. It builds the work table once for all layers.

    Layers share the counters: of the pairs taken, and of each sequence's finished chunks. Each layer resets them to 0.
    """

    def __init__(
        self, tiles: AttentionTiles, shape: AttentionShape, *, plan: TritonPlan | None = None, interpret: bool = False
    ) -> None:
        _check(shape)
        self._shape, self._interpret = shape, interpret
        self._plan = plan = triton_plan(shape) if plan is None else plan
        self._work_shape = WorkShape.of(shape, plan)
        self._work = work_table(tiles, self._work_shape)
        self._page_table = tiles.page_table
        self._counters = jnp.zeros(1 + shape.num_seqs * shape.num_kv_heads, jnp.int32)

    def __call__(self, q: jax.Array, pool: LayerPool) -> jax.Array:
        """See `PagedAttention.__call__`."""
        shape, plan, work = self._shape, self._plan, self._work_shape
        num_rows, num_heads, head_dim = q.shape
        if num_rows > shape.max_rows:
            raise ValueError(f"paged_attention: {num_rows} rows, but the tiles are for at most {shape.max_rows}")
        block_g = triton.next_power_of_2(shape.group)
        added = 8192 if block_g < 8 else 4096  # numbers added up at once; twice as many spill with eight heads
        scale, cap = math.log2(math.e) * head_dim**-0.5, shape.score_cap
        out, self._counters, _, _ = triton_call(
            paged_attention_kernel,
            q, pages_of(pool), self._page_table, self._work, self._counters,
            pool.scales if isinstance(pool, ScaledPages) else pages_of(pool),
            out=[
                jax.ShapeDtypeStruct(q.shape, q.dtype),
                jax.ShapeDtypeStruct(self._counters.shape, jnp.int32),
                jax.ShapeDtypeStruct((work.decode_items, num_heads, head_dim), jnp.float32),
                jax.ShapeDtypeStruct((work.decode_items, num_heads, 2), jnp.float32),
            ],
            aliases={4: 1}, grid=(work.grid,),
            num_warps=plan.warps, num_stages=plan.stages, interpret=self._interpret,
            T=num_rows, SCALE=scale if cap is None else math.log2(math.e) * cap,
            CAP=0.0 if cap is None else 2 * scale / cap, KV=shape.kv_dtype or "", GROUP=shape.group, HEADS=num_heads,
            HEAD_DIM=head_dim, PAGE_SIZE=shape.page_size, MAX_PAGES=shape.max_pages, WINDOW=shape.window or 0,
            FIELDS=len(FIELDS), PREFILL_ITEMS=work.prefill_items, ROW=triton.next_power_of_2(num_heads * head_dim),
            PREFILL_M=plan.prefill_m, PREFILL_N=plan.prefill_n, PREFILL_STAGES=plan.prefill_stages,
            BLOCK_N=plan.block_n, STAGES=plan.stages,
            BLOCK_G=block_g, BLOCK_P=max(2, added // (block_g * head_dim)),
        )  # fmt: skip
        return out


def _check(shape: AttentionShape) -> None:
    declined = None
    device = devices.target()
    if shape.dtype not in (jnp.bfloat16, jnp.float16):
        declined = f"a {shape.dtype} pool; bfloat16 and float16 are served"
    elif shape.kv_dtype == "fp8" and device is not None and device.compute_capability < 89:
        declined = f"fp8 keys and values on {device.name}; int8 is served"
    elif shape.head_dim not in (16, 32, 64, 128, 256):
        declined = f"head_dim {shape.head_dim}; 16, 32, 64, 128 and 256 are served"
    elif shape.group > MOST_GROUP:
        declined = f"{shape.group} query heads to a key-value head; at most {MOST_GROUP} are served"
    if declined:
        raise NotImplementedError(f"paged_attention in Triton: {declined}; pass implementation='xla'")
