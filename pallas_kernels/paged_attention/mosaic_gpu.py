"""Paged attention for Hopper (sm_90a) in Pallas Mosaic GPU: pages come by TMA, products run on warpgroup MMA.

*Decode* (every sequence has one row) is flash-decoding. Contexts are cut into chunks of one length, a block takes one
chunk and one KV head, and a second, small launch merges the chunks: Mosaic GPU has no tested way for the last block of
a sequence to know itself (the Triton backend does it in one launch). The operands are swapped, so that the 64 rows that
the tensor core wants are tokens, and the few query heads of a group are its columns.

*Mixed* (chunked prefill and decode rows together) is one launch. A block takes `R` rows of one sequence times the heads
of a group, packed to 64 rows for each of its warpgroups, through the sequence's keys up to its last row. A TMA tile is
aligned, so blocks begin at multiples of `R` rows of the step; rows of others are computed along, and not stored.

In both, a warpgroup of its own copies pages ahead, one tile `[page_size, head_dim]` per copy.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from math import gcd
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.lora.layout import ceil_div
from pallas_kernels.paged_attention.plan import AttentionShape

if TYPE_CHECKING:
    from pallas_kernels.paged_attention.api import AttentionTiles

MASKED = -1e30
"""Score of a key that a query must not see; finite, so that a fully masked step leaves no NaN."""

LOG2_E = 1.4426950408889634

WGMMA = plgpu.Layout.WGMMA
PER_ROW, PER_COLUMN = WGMMA.reduce(1), WGMMA.reduce(0)
TILED = (plgpu.TilingTransform((8, 64)), plgpu.SwizzleTransform(128))  # type: ignore[abstract]
"""Shared-memory layout of 16-bit matrices that both TMA and the tensor core take."""

COMPILER = plgpu.CompilerParams(approx_math=True)


@dataclass(frozen=True)
class MosaicAttentionPlan:
    """Block shapes.

    decode_tokens, prefill_tokens: keys per step of a block, multiples of 64.
    decode_bytes, prefill_bytes: shared memory for keys and values in flight, at least two steps. min_chunk: shortest
    context chunk of a decode block, in tokens, a multiple of decode_tokens. split_blocks: decode blocks wanted beyond
    one per sequence and KV head. consumers: warpgroups of 64 packed rows in a mixed block.
    """

    decode_tokens: int = 64
    decode_bytes: int = 98_304
    min_chunk: int = 256
    split_blocks: int = 1056
    prefill_tokens: int = 128
    prefill_bytes: int = 131_072
    consumers: int = 2

    def step(self, shape: AttentionShape) -> int:
        """Keys per step of a block."""
        return self.decode_tokens if shape.decode else self.prefill_tokens

    def block_rows(self, group: int) -> int:
        """Rows of a mixed block: a power of two; times the group's heads it fills the consumers."""
        return 64 * self.consumers // (1 << (group - 1).bit_length())


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class MosaicWork:
    """The exact work list of a step, shared by all layers.

    items: int32 `[N, 6]`; surplus items are zeros. Decode: `(seq, row, first key seen, begin, end, 0)`: keys `begin` to
      `end` of a sequence, for its row. Mixed: `(seq, block's first row, own rows from, to, position minus row, keys of
      the sequence)`.
    row_items: int32 `[T, 2]`, of a decode step: each row's first item, and how many it has.
    """

    items: jax.Array
    row_items: jax.Array


def prepare(tiles: AttentionTiles, shape: AttentionShape, plan: MosaicAttentionPlan) -> MosaicWork:
    """Builds the work list of a step: plain XLA, once per step."""
    return _decode_work(tiles, shape, plan) if shape.decode else _mixed_work(tiles, shape, plan)


def _decode_work(tiles: AttentionTiles, shape: AttentionShape, plan: MosaicAttentionPlan) -> MosaicWork:
    bound = shape.num_seqs + ceil_div(plan.split_blocks, shape.num_kv_heads)
    live = jnp.arange(shape.num_seqs) < tiles.num_decode
    tokens = jnp.where(live, tiles.context[tiles.decode_seq] + 1, 0)
    seen = jnp.maximum(tokens - (shape.window or shape.max_tokens), 0)
    begin = seen // plan.decode_tokens * plan.decode_tokens
    doublings = (ceil_div(shape.max_tokens, plan.min_chunk) - 1).bit_length()
    chunks = plan.min_chunk << jnp.arange(doublings + 1)
    fits = (-((begin - tokens) // chunks[:, None])).sum(1) <= bound  # the longest always does: one item per sequence
    chunk = chunks[jnp.argmax(fits)]

    count = -((begin - tokens) // chunk)
    last = jnp.cumsum(count)
    item = jnp.arange(bound)
    entry = jnp.minimum(jnp.searchsorted(last, item, side="right", method="compare_all"), shape.num_seqs - 1)
    first = begin[entry] + (item - (last - count)[entry]) * chunk
    seq = tiles.decode_seq[entry]
    end = jnp.minimum(first + chunk, tokens[entry])
    fields = (seq, tiles.first_row[seq], seen[entry], first, end, jnp.zeros_like(seq))
    row = jnp.where(live, tiles.first_row[tiles.decode_seq], shape.max_rows)
    row_items = jnp.zeros((shape.max_rows, 2), jnp.int32)
    row_items = row_items.at[row].set(jnp.stack([last - count, count], 1), mode="drop")
    return MosaicWork(_items(fields, last[-1]), row_items)


def _mixed_work(tiles: AttentionTiles, shape: AttentionShape, plan: MosaicAttentionPlan) -> MosaicWork:
    rows = plan.block_rows(shape.group)
    blocks = ceil_div(shape.max_rows, rows)
    total = jnp.max(tiles.first_row + tiles.length)
    # The rows behind the last sequence are one more sequence, without keys: zeros are written there.
    first_row = jnp.append(tiles.first_row, total)
    last_row = first_row + jnp.append(tiles.length, blocks * rows - total)
    keys = jnp.append(tiles.context + tiles.length, 0)
    shift = jnp.append(tiles.context, 0) - first_row

    count = jnp.where(last_row > first_row, (last_row - 1) // rows - first_row // rows + 1, 0)
    last = jnp.cumsum(count)
    item = jnp.arange(blocks + shape.num_seqs)
    seq = jnp.minimum(jnp.searchsorted(last, item, side="right", method="compare_all"), shape.num_seqs)
    block = (first_row[seq] // rows + item - (last - count)[seq]) * rows
    own = jnp.maximum(block, first_row[seq]), jnp.minimum(block + rows, last_row[seq])
    fields = (jnp.minimum(seq, shape.num_seqs - 1), block, *own, shift[seq], keys[seq])
    items = _items(fields, last[-1])
    longest_first = jnp.argsort(-jnp.minimum(items[:, 3] + items[:, 4], items[:, 5]))
    return MosaicWork(items[longest_first], jnp.zeros((0, 2), jnp.int32))


def _items(fields: tuple[jax.Array, ...], count: jax.Array) -> jax.Array:
    table = jnp.stack(fields, 1).astype(jnp.int32)
    return jnp.where(jnp.arange(table.shape[0])[:, None] < count, table, 0)


class Attention:
    """The Mosaic GPU implementation of `PagedAttention`, for one step: the work list is made here, for all layers.

    tile_rows is not used: blocks are cut by `MosaicAttentionPlan.block_rows`. interpret: Pallas' GPU interpreter, with
    race detection. Raises NotImplementedError for what TMA and its swizzle, or the tensor core, cannot do.
    """

    def __init__(
        self,
        tiles: AttentionTiles,
        shape: AttentionShape,
        tile_rows: int = 0,
        *,
        plan: MosaicAttentionPlan = MosaicAttentionPlan(),
        interpret: bool = False,
    ) -> None:
        _check(shape, plan)
        self._shape, self._plan, self._pages = shape, plan, tiles.page_table
        self._interpret = plgpu.InterpretGPUParams(detect_races=True) if interpret else None
        self._work = prepare(tiles, shape, plan)

    def __call__(self, q: jax.Array, pool: jax.Array) -> jax.Array:
        """See `PagedAttention.__call__`."""
        if q.dtype != pool.dtype:
            raise NotImplementedError(f"mosaic_gpu attention: q is {q.dtype}, the pool {pool.dtype}; they must be one")
        if q.shape[0] > self._shape.max_rows:
            raise ValueError(f"mosaic_gpu attention: {q.shape[0]} rows, but the tiles are for {self._shape.max_rows}")
        attend = _decode if self._shape.decode else _mixed
        tokens = pool.reshape(
            -1, self._shape.width
        )  # rows of a page's keys, then of its values; TMA takes a row number
        return attend(q, tokens, self._pages, self._work, self._shape, self._plan, self._interpret)


def paged_attention(
    q: jax.Array,
    pool: jax.Array,
    tiles: AttentionTiles,
    *,
    num_kv_heads: int,
    decode: bool,
    tile_rows: int = 0,
    window: int | None = None,
    interpret: bool = False,
    plan: MosaicAttentionPlan = MosaicAttentionPlan(),
) -> jax.Array:
    """One layer's attention on its own: `Attention` made and called."""
    rows, num_heads, head_dim = q.shape
    seqs, max_pages = tiles.page_table.shape
    shape = AttentionShape(
        num_heads, num_kv_heads, head_dim, pool.shape[2], pool.dtype, seqs, max_pages, rows, decode, window
    )
    return Attention(tiles, shape, tile_rows, plan=plan, interpret=interpret)(q, pool)


def _check(shape: AttentionShape, plan: MosaicAttentionPlan) -> None:
    declined = None
    if shape.dtype not in (jnp.bfloat16, jnp.float16):
        declined = f"dtype {shape.dtype}; bfloat16 and float16 go through the tensor core"
    elif shape.head_dim % 64 or shape.head_dim > 256:
        declined = f"head_dim {shape.head_dim}; a swizzled tile is 64 wide, and registers hold 256"
    elif shape.head_dim > 128 and not shape.decode:
        declined = f"head_dim {shape.head_dim} with prefill; the sums of 64 rows would spill registers"
    elif shape.page_size % 8 or plan.step(shape) % shape.page_size:
        declined = f"page_size {shape.page_size}; a swizzled tile has 8 rows, and a step {plan.step(shape)} tokens"
    elif plan.block_rows(shape.group) < 8 and not shape.decode:
        declined = f"{shape.group} query heads per KV head; {8 * plan.consumers} fit a block"
    if declined:
        raise NotImplementedError(f"mosaic_gpu attention: {declined}")


def _ring(shape: AttentionShape, plan: MosaicAttentionPlan, consumers: int) -> tuple[Any, ...]:
    """Shared memory of the page pipeline: keys, values, and barriers: keys there, values there, stage free again."""
    step = plan.step(shape)
    stages = max((plan.decode_bytes if shape.decode else plan.prefill_bytes) // (step * shape.head_dim * 4), 2)
    buffer = plgpu.SMEM((stages, step, shape.head_dim), shape.dtype, transforms=TILED)
    ready = plgpu.Barrier(num_arrivals=step // shape.page_size, num_barriers=stages)
    return buffer, buffer, ready, ready, plgpu.Barrier(num_arrivals=consumers, num_barriers=stages)


def _copy_pages(pages: Any, tokens: Any, page_size: int, seq: Any, head: Any, keys: tuple[Any, Any], ring: Any) -> None:
    """The producer: copies keys and values of tokens `keys = (begin, end)` of a sequence, step by step, as stages come
    free. A step always fills its stage: behind the last page that is wanted, with that page again. The pages of a step
    are dealt to the four warps."""
    k_smem, v_smem, k_ready, v_ready, consumed = ring
    stages, step_tokens, head_dim = k_smem.shape
    columns = pl.ds(head * head_dim, head_dim)
    per_step = step_tokens // page_size
    warps = min(4, per_step)
    begin, end = keys
    steps = _steps(begin, end, step_tokens)

    def produce(warp: Any) -> None:
        first_page, last_page = lax.div(begin, page_size) + warp, lax.div(end - 1, page_size)

        def ids(step: Any) -> tuple[Any, ...]:
            first = first_page + step * per_step
            return tuple(pages[seq, jnp.minimum(first + j, last_page)] for j in range(0, per_step, warps))

        def copy(step: Any, page_ids: tuple[Any, ...]) -> tuple[Any, ...]:
            stage = lax.rem(step, stages)

            @pl.when(step >= stages)
            def _wait() -> None:
                plgpu.barrier_wait(consumed.at[stage])

            for smem, ready, tile in ((k_smem, k_ready, 0), (v_smem, v_ready, 1)):
                for j, page in enumerate(page_ids):
                    source = tokens.at[pl.ds((page * 2 + tile) * page_size, page_size), columns]
                    target = smem.at[stage, pl.ds((j * warps + warp) * page_size, page_size)]
                    plgpu.copy_gmem_to_smem(source, target, ready.at[stage])
            return ids(step + 1)  # before the wait for a free stage, which hides its latency

        @pl.when((warp < warps) & (steps > 0))
        def _copy() -> None:
            lax.fori_loop(0, steps, copy, ids(0))

    plgpu.warp_map(produce)


def _steps(begin: Any, end: Any, step_tokens: int) -> Any:
    return lax.div(end - begin + step_tokens - 1, step_tokens)


def _product(shape: Any, a: Any, b: Any) -> Any:
    """`a @ b` in float32 on the tensor core."""

    def multiply(acc: Any) -> Any:
        plgpu.wgmma(acc, a, b)
        return acc[...]

    return pl.run_scoped(multiply, plgpu.ACC(shape, jnp.float32))


def _clear_stale(v_smem: Any, live: Any) -> None:
    """Zeros a stage's values from row `live` on: what a page's former owner left may be NaN, and 0 * NaN is NaN."""
    row = plgpu.broadcasted_iota(jnp.int32, (64, 64), 0, layout=WGMMA)

    @pl.loop(0, v_smem.shape[0] // 64)
    def _rows(r: Any) -> None:
        @pl.loop(0, v_smem.shape[1] // 64)
        def _columns(c: Any) -> None:
            part = v_smem.at[pl.ds(r * 64, 64), pl.ds(c * 64, 64)]
            values = plgpu.load(part, layout=WGMMA)
            part[...] = jnp.where(row < live - r * 64, values, jnp.zeros_like(values))

    plgpu.commit_smem()


def _full(shape: tuple[int, ...], value: float, layout: Any) -> Any:
    return plgpu.layout_cast(jnp.full(shape, value, jnp.float32), layout)


def _along(x: Any, axis: int, shape: tuple[int, ...]) -> Any:
    """A vector along `axis` of a matrix."""
    return lax.broadcast_in_dim(x, shape, [axis])


def _decode(
    q: jax.Array,
    tokens: jax.Array,
    pages: jax.Array,
    work: MosaicWork,
    shape: AttentionShape,
    plan: MosaicAttentionPlan,
    interpret: Any,
) -> jax.Array:
    rows, num_heads, head_dim = q.shape
    group, step_tokens = shape.group, plan.step(shape)
    # A block reads query rows `[T * H, head_dim]` in aligned windows that hold a group wherever it begins.
    columns = ceil_div(8 - gcd(group, 8) + group, 8) * 8
    heads = q.reshape(rows * num_heads, head_dim)
    if spare := max(-heads.shape[0] % 8, columns - heads.shape[0]):
        heads = jnp.pad(heads, ((0, spare), (0, 0)))

    def window(row: Any, head: Any) -> tuple[Any, Any]:
        """A group's first query row, and that of its window."""
        first = row * num_heads + head * group
        return first, jnp.minimum(lax.div(first, 8) * 8, heads.shape[0] - columns)

    def paged_attention_decode(*refs: Any) -> None:
        items, pages, tokens, heads, acc_out, stat_out, q_smem, p_smem, q_ready, *ring = refs
        item, head, warpgroup = (lax.axis_index(name) for name in ("item", "head", "warpgroup"))
        seq, row, seen, begin, end = (items[item, field] for field in range(5))

        @pl.when((warpgroup == 1) & (end > begin))
        def _produce() -> None:
            _copy_pages(pages, tokens, shape.page_size, seq, head, (begin, end), ring)

        @pl.when((warpgroup == 0) & (end > begin))
        def _consume() -> None:
            k_smem, v_smem, k_ready, v_ready, consumed = ring
            plgpu.copy_gmem_to_smem(heads.at[pl.ds(window(row, head)[1], columns)], q_smem, q_ready)
            plgpu.barrier_wait(q_ready)
            token = plgpu.broadcasted_iota(jnp.int32, (step_tokens, columns), 0, layout=WGMMA)

            def attend(step: Any, state: tuple[Any, Any, Any]) -> tuple[Any, Any, Any]:
                highest, total, acc = state
                stage, first = lax.rem(step, k_smem.shape[0]), begin + step * step_tokens
                plgpu.barrier_wait(k_ready.at[stage])
                scores = _product(token.shape, k_smem.at[stage], q_smem.transpose((1, 0)))
                live = (token >= seen - first) & (token < end - first)
                scores = jnp.where(live, scores * (head_dim**-0.5 * LOG2_E), MASKED)
                new = jnp.maximum(highest, scores.max(axis=0))
                decay, p = jnp.exp2(highest - new), jnp.exp2(scores - _along(new, 1, scores.shape))
                p_smem.transpose((1, 0))[...] = p.astype(p_smem.dtype)
                plgpu.commit_smem()
                plgpu.barrier_wait(v_ready.at[stage])

                @pl.when(first + step_tokens > end)
                def _clear() -> None:
                    _clear_stale(v_smem.at[stage], end - first)

                pv = _product(acc.shape, v_smem.at[stage].transpose((1, 0)), p_smem.transpose((1, 0)))
                plgpu.barrier_arrive(consumed.at[stage])
                return new, total * _along(decay, 1, p.shape) + p, acc * _along(decay, 1, acc.shape) + pv

            totals, acc = _full(token.shape, 0, WGMMA), _full((head_dim, columns), 0, WGMMA)
            state = (_full((columns,), MASKED, PER_COLUMN), totals, acc)
            highest, totals, acc = lax.fori_loop(0, _steps(begin, end, step_tokens), attend, state)
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
            *_ring(shape, plan, consumers=1),
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
            acc = acc * _along(mine, 1, acc.shape) + their_acc * _along(its, 1, acc.shape)
            return new, total * mine + their_total * its, acc

        state = (_full((columns,), MASKED, PER_COLUMN), _full((columns,), 0, PER_COLUMN))
        _, total, acc = lax.fori_loop(0, count, merge, (*state, _full((head_dim, columns), 0, WGMMA)))
        norm = 1 / jnp.maximum(total, 1e-30)  # a row of no sequence has no items: zeros
        o_smem.transpose((1, 0))[...] = (acc * _along(norm, 1, acc.shape)).astype(o_smem.dtype)
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


def _mixed(
    q: jax.Array,
    tokens: jax.Array,
    pages: jax.Array,
    work: MosaicWork,
    shape: AttentionShape,
    plan: MosaicAttentionPlan,
    interpret: Any,
) -> jax.Array:
    num_rows, _, head_dim = q.shape
    group, window, step_tokens, consumers = shape.group, shape.window, plan.step(shape), plan.consumers
    rows = plan.block_rows(group)
    part = min(rows, 64)  # rows of one head in one warpgroup
    scale = head_dim**-0.5 * LOG2_E
    queries = q.reshape(num_rows, -1)
    if spare := ceil_div(shape.max_rows, rows) * rows - num_rows:
        queries = jnp.pad(queries, ((0, spare), (0, 0)))

    def paged_attention_mixed(*refs: Any) -> None:
        items, pages, tokens, queries, out, qo_smem, p_smem, q_ready, cleared, attended, *ring = refs
        item, head, warpgroup = (lax.axis_index(name) for name in ("item", "head", "warpgroup"))
        seq, block, own_first, own_last, shift, live = (items[item, field] for field in range(6))
        end = jnp.minimum(own_last + shift, live)
        begin = jnp.maximum(own_first + shift + 1 - window, 0) if window else jnp.int32(0)
        begin = lax.div(begin, step_tokens) * step_tokens

        def part_of(p: int) -> tuple[Any, Any, Any]:
            """A warpgroup's part `p`: its head in the group, that head's columns of a row, its first row."""
            first = warpgroup * 64 + p * part
            member = lax.div(first, rows)
            column = (head * group + jnp.minimum(member, group - 1)) * head_dim
            return member, pl.ds(column, head_dim), lax.rem(first, rows)

        @pl.when(warpgroup == consumers)
        def _produce() -> None:
            plgpu.set_max_registers(40, action="decrease")
            _copy_pages(pages, tokens, shape.page_size, seq, head, (begin, end), ring)

        @pl.when((warpgroup < consumers) & (own_last > own_first))
        def _consume() -> None:
            plgpu.set_max_registers(232, action="increase")
            k_smem, v_smem, k_ready, v_ready, consumed = ring
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
                scores = _product((64, step_tokens), q_smem.at[warpgroup], k_smem.at[stage].transpose((1, 0)))
                if masked:
                    row = plgpu.broadcasted_iota(jnp.int32, (64,), 0, layout=PER_ROW) + warpgroup * 64
                    newest = _along((row & (rows - 1)) + (block + shift - first), 0, scores.shape)
                    key = plgpu.broadcasted_iota(jnp.int32, scores.shape, 1, layout=WGMMA)
                    seen = (key <= newest) & (key > newest - window) if window else key <= newest
                    scores = jnp.where(seen, scores, MASKED)
                new = jnp.maximum(highest, scores.max(axis=1) * scale)
                decay = jnp.exp2(highest - new)
                weights = jnp.exp2(scores * scale - _along(new, 0, scores.shape))
                total = total * decay + weights.sum(axis=1)
                weights = weights.astype(q.dtype)
                plgpu.barrier_wait(v_ready.at[stage])
                if masked:
                    stale = first + step_tokens > live

                    @pl.when(stale & (warpgroup == 0))
                    def _clear() -> None:
                        _clear_stale(v_smem.at[stage], live - first)
                        plgpu.barrier_arrive(cleared)

                    pl.when(stale)(lambda: plgpu.barrier_wait(cleared))
                acc *= _along(decay, 0, acc.shape)
                if interpret:  # the interpreter knows neither an operand in registers nor `run_state`
                    p_smem.at[warpgroup][...] = weights
                    acc += _product(acc.shape, p_smem.at[warpgroup], v_smem.at[stage])
                else:
                    acc = pl.run_state(lambda ref: plgpu.wgmma(ref, weights, v_smem.at[stage]))(plgpu.ACC.init(acc))
                plgpu.barrier_arrive(consumed.at[stage])
                return new, total, acc

            state = (_full((64,), MASKED, PER_ROW), _full((64,), 0, PER_ROW), _full((64, head_dim), 0, WGMMA))
            steps, unmasked = _steps(begin, end, step_tokens), jnp.int32(0)
            if not window:
                unmasked = jnp.minimum(lax.div(own_first + shift + 1, step_tokens), steps)
                state = lax.fori_loop(0, unmasked, partial(attend, masked=False), state)
            _, total, acc = lax.fori_loop(unmasked, steps, partial(attend, masked=True), state)

            plgpu.barrier_arrive(attended)
            plgpu.barrier_wait(attended)  # queries and output share memory
            norm = 1 / jnp.maximum(total, 1e-30)  # rows of no sequence have no keys: zeros
            o_smem.at[warpgroup][...] = (acc * _along(norm, 0, acc.shape)).astype(o_smem.dtype)
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

    packed = (consumers, 64, head_dim)
    out = plgpu.kernel(
        paged_attention_mixed,
        out_type=jax.ShapeDtypeStruct(queries.shape, q.dtype),
        scratch_types=(
            plgpu.RefUnion(plgpu.SMEM(packed, q.dtype, transforms=TILED), plgpu.SMEM(packed, q.dtype)),
            plgpu.SMEM((consumers, 64, step_tokens), q.dtype, transforms=TILED) if interpret else None,
            plgpu.Barrier(num_arrivals=64 // part, num_barriers=consumers),
            plgpu.Barrier(),
            plgpu.Barrier(num_arrivals=consumers),
            *_ring(shape, plan, consumers),
        ),
        grid=(work.items.shape[0], shape.num_kv_heads),
        grid_names=("item", "head"),
        num_threads=consumers + 1,
        thread_name="warpgroup",
        compiler_params=COMPILER,
        interpret=interpret,
    )(work.items, pages, tokens, queries)
    return out[:num_rows].reshape(q.shape)
