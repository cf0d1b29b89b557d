"""Paged attention in Triton, under its interpreter, against float64 NumPy and the XLA reference.

Free pages, stale rows of live pages and unwritten outputs are NaN.
"""

import heapq
from dataclasses import replace

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from test_paged_attention import GROUPED, Shape, Step, random_sequences

from pallas_kernels.devices import DEVICES, compiling_for
from pallas_kernels.kv_format import kv_dtype_of
from pallas_kernels.paged_attention import AttentionTiles, PagedAttention, paged_attention, triton, xla
from pallas_kernels.paged_attention.plan import AttentionShape, TritonPlan, triton_plan
from pallas_kernels.paged_attention.work import FIELDS, WorkShape, count_items, split, work_table

pytestmark = pytest.mark.filterwarnings("ignore:overflow encountered in cast")  # float16 pools' dummy page

PLAN = TritonPlan(warps=4, per_sm=7, block_n=16, stages=1, prefill_m=32, prefill_n=32, prefill_stages=1)
"""Small blocks, so that long contexts are cut into chunks, and fewer programs than most steps have items."""

GROUP_OF_4 = Shape(heads=8, kv_heads=2, head_dim=64, page_size=16, mixed_rows=48)
GROUP_OF_8 = Shape(heads=8, kv_heads=1, head_dim=256, page_size=8, mixed_rows=40)  # adds up 4 parts at once
MULTI_HEAD = Shape(heads=2, kv_heads=2, head_dim=128, page_size=32, mixed_rows=64)
GROUP_OF_3 = Shape(heads=6, kv_heads=2, head_dim=64, page_size=8, mixed_rows=40, tile_rows=9)

# (shape, dtype, window, cap, decode): together they take every branch of the kernel.
CASES = {
    "decode_group_of_4": (GROUP_OF_4, "bfloat16", None, None, True),
    "decode_group_of_8_f16": (GROUP_OF_8, "float16", None, None, True),
    "decode_group_of_4_fp8": (GROUP_OF_4, "bfloat16+fp8", None, None, True),
    "mixed_group_of_3_int8": (GROUP_OF_3, "bfloat16+int8", None, 2.0, False),
    "mixed_multi_head_fp8": (MULTI_HEAD, "float16+fp8", 37, None, False),
    "decode_group_of_4_int8": (GROUP_OF_4, "float16+int8", 60, None, True),
    "decode_multi_head_window": (MULTI_HEAD, "bfloat16", 1, None, True),
    "decode_group_of_4_cap": (GROUP_OF_4, "bfloat16", 60, 2.0, True),
    "mixed_group_of_4_cap": (GROUP_OF_4, "float16", None, 2.0, False),
    "mixed_multi_head": (MULTI_HEAD, "bfloat16", None, None, False),
    "mixed_group_of_4_window": (GROUP_OF_4, "float16", 37, None, False),
    "mixed_group_of_3_window": (GROUP_OF_3, "bfloat16", 70, None, False),
    "mixed_group_of_8_f16": (GROUP_OF_8, "float16", None, None, False),
}


def static_shape(step: Step, window: int | None = None, cap: float | None = None) -> AttentionShape:
    shape, (num_seqs, max_pages) = step.shape, step.tiles.page_table.shape
    rows = num_seqs if step.decode else (step.tiles.prefill_seq.shape[0] - num_seqs) * shape.tile_rows
    return AttentionShape(
        shape.heads, shape.kv_heads, shape.head_dim, shape.page_size, jnp.dtype(step.dtype), num_seqs, max_pages, rows,
        step.decode, window, cap, kv_dtype_of(step.pool),
    )  # fmt: skip


def run(
    step: Step, window: int | None = None, plan: TritonPlan = PLAN, layers: int = 1, cap: float | None = None
) -> list[np.ndarray]:
    """The outputs of `layers` layers over the same pool, in one program."""

    @jax.jit
    def program(q, pool, tiles):
        attend = triton.Attention(tiles, static_shape(step, window, cap), plan=plan, interpret=True)
        return [attend(q, pool) for _ in range(layers)]

    return [np.asarray(out) for out in program(step.q, step.pool, step.tiles)]


def check(step: Step, out: np.ndarray, window: int | None = None, cap: float | None = None) -> None:
    """Errors: a rounding of each weight and of the result to q's dtype, and 1e-4 of the sum of absolute terms."""
    shape, row = step.shape, 0
    eps = 2.0**-8 if step.dtype == ml_dtypes.bfloat16 else 2.0**-11
    heads, group = (-1, shape.kv_heads, shape.head_dim), shape.heads // shape.kv_heads
    assert out.dtype == step.dtype and out.shape == step.q.shape
    for seq, (context, length) in enumerate(step.sequences):
        for position in range(context, context + length):
            seen = slice(0 if window is None else max(0, position + 1 - window), position + 1)
            k = np.repeat(step.keys[seq][seen].astype(float).reshape(heads), group, 1)  # [t, H, hd]
            v = np.repeat(step.values[seq][seen].astype(float).reshape(heads), group, 1)
            scores = np.einsum("hd,thd->th", step.q[row].astype(float), k) * shape.head_dim**-0.5
            scores = scores if cap is None else cap * np.tanh(scores / cap)
            p = np.exp(scores - scores.max(0))
            p /= p.sum(0)
            expected, terms = np.einsum("th,thd->hd", p, v), np.einsum("th,thd->hd", p, abs(v))
            error = abs(out[row].astype(float) - expected)
            assert (error <= (eps + 1e-4) * terms + eps * abs(expected)).all(), (seq, position, length, error.max())
            row += 1
    np.testing.assert_array_equal(out[row:], np.zeros_like(out[row:]))


@pytest.mark.parametrize(("shape", "dtype", "window", "cap", "decode"), CASES.values(), ids=CASES)
def test_each_row_attends_to_its_own_sequence(shape, dtype, window, cap, decode, rng):
    sequences = random_sequences(shape, decode, rng)[: 10 if decode else None]
    print("(context, length)", sequences)
    step = Step(shape, dtype, sequences, decode, rng)
    check(step, run(step, window, cap=cap)[0], window, cap)


@pytest.mark.parametrize(
    ("window", "cap", "decode"),
    [(1, None, False), (20, None, True), (150, None, False), (None, 2.0, False), (20, 2.0, True)],
    ids=str,
)
def test_the_reference_sees_the_newest_keys_of_a_window_and_limits_scores(decode, window, cap, rng):
    step = Step(GROUPED, "bfloat16", random_sequences(GROUPED, decode, rng), decode, rng)  # its scale, 1/8, is exact
    shape = static_shape(step, window, cap)
    attend = jax.jit(lambda q, pool, tiles: xla.Attention(tiles, shape, GROUPED.tile_rows)(q, pool))
    check(step, np.asarray(attend(step.q, step.pool, step.tiles)), window, cap)


def test_layers_share_the_work_and_give_the_same_bits(rng):
    """Decode rows in several chunks and in one, and prefill tiles, in one step."""
    step = Step(GROUP_OF_4, "bfloat16", [(180, 1), (0, 20), (67, 1), (30, 5), (0, 1)], False, rng)
    first, other = run(step, layers=2)
    check(step, first)
    np.testing.assert_array_equal(other.view(np.uint16), first.view(np.uint16))


@pytest.mark.parametrize("decode", [True, False], ids=["decode", "mixed"])
def test_a_step_of_padding_only_is_zero(decode, rng):
    assert not run(Step(GROUP_OF_4, "bfloat16", [], decode, rng))[0].any()


def test_large_scores_neither_overflow_nor_vanish(rng):
    step = Step(GROUP_OF_4, "bfloat16", [(180, 20), (100, 1)], False, rng)
    step.q = (np.sign(step.q.astype(float)) * 2.0**10).astype(step.dtype)  # scores of several thousand
    check(step, run(step)[0])


def test_the_plan_tables_blocks_agree_with_the_reference(rng):
    step = Step(GROUP_OF_4, "bfloat16", [(150, 1), (60, 30)], False, rng)
    static = {"num_kv_heads": 2, "decode": False, "tile_rows": GROUP_OF_4.tile_rows}
    got = paged_attention(jnp.asarray(step.q), step.pool, step.tiles, **static, implementation="triton", interpret=True)
    expected = paged_attention(jnp.asarray(step.q), step.pool, step.tiles, **static)
    np.testing.assert_allclose(np.asarray(got, np.float32), np.asarray(expected, np.float32), atol=2**-6, rtol=2**-6)


WORK_SEQS, WORK_ROWS, MOST_CONTEXT = 24, 128, 4000


def work_tiles(context: np.ndarray, length: np.ndarray) -> AttentionTiles:
    one = sorted(np.flatnonzero(length == 1).tolist(), key=lambda s: -context[s])
    decode_seq = np.zeros(WORK_SEQS, np.int32)
    decode_seq[: len(one)] = one
    first_row = np.where(length > 0, np.cumsum(length) - length, 0)
    unused = np.zeros((WORK_SEQS, 1)), np.zeros(0)
    arrays = unused[0], first_row, length, context, unused[1], unused[1], 0, decode_seq, len(one)
    return AttentionTiles(*(jnp.asarray(a, jnp.int32) for a in arrays))


def live_items(table: jax.Array, shape: WorkShape) -> tuple[list[dict[str, int]], list[dict[str, int]]]:
    """The prefill and decode items of a table; all other rows are empty, and all rows have the items' numbers."""
    entries = [dict(zip(FIELDS, row, strict=True)) for row in np.asarray(table).tolist()]
    num_prefill, num_decode = entries[0]["num_prefill"], entries[0]["num_decode"]
    assert all((entry["num_prefill"], entry["num_decode"]) == (num_prefill, num_decode) for entry in entries)
    live = [*range(num_prefill), *range(shape.prefill_items, shape.prefill_items + num_decode)]
    assert live == [i for i, entry in enumerate(entries) if entry["rows"]]
    return entries[:num_prefill], entries[shape.prefill_items :][:num_decode]


def decode_shape(programs: int, items: int, window: int | None = None) -> WorkShape:
    return WorkShape(programs, 0, 0, items, block=16, max_blocks=251, kv_heads=2, group=4, window=window)


@pytest.mark.parametrize(
    ("items", "programs", "window"), [(WORK_SEQS, 9, None), (40, 80, 300), (200, 200, None), (200, 200, 300)], ids=str
)
def test_decode_items_cover_every_context_once_and_evenly(items, programs, window, rng):
    shape = decode_shape(programs, items, window)
    build = jax.jit(lambda tiles: work_table(tiles, shape))
    for most in (1, 20, MOST_CONTEXT, MOST_CONTEXT, MOST_CONTEXT):
        context = rng.integers(0, most + 1, WORK_SEQS)
        length = rng.integers(0, 3, WORK_SEQS)
        _, table = live_items(build(work_tiles(context, length)), shape)
        assert len(table) <= items
        assert {item["seq"] for item in table} == set(np.flatnonzero(length == 1).tolist())
        while table:
            parts, table = table[: table[0]["parts"]], table[table[0]["parts"] :]
            seq, tokens = parts[0]["seq"], context[parts[0]["seq"]] + 1
            assert [item["part"] for item in parts] == list(range(len(parts)))
            assert all((item["seq"], item["row"], item["rows"]) == (seq, length[:seq].sum(), 1) for item in parts)
            begins, ends = [item["begin"] for item in parts], [item["end"] for item in parts]
            assert (begins[0], ends[-1]) == (0 if window is None else max(0, tokens - window), tokens)
            assert begins[1:] == ends[:-1]
            sizes = np.subtract(ends, begins)
            assert (sizes[:-1] == sizes[0]).all() and 0 < sizes[-1] <= sizes[0]
            assert len(parts) == 1 or sizes[0] % 16 == 0


def makespan(blocks: np.ndarray, parts: np.ndarray, shape: WorkShape) -> float:
    """Time of decode items, in blocks, if a free program takes the next item."""
    chunk = -(-blocks // parts)
    costs = [1 + min(c, b - i * c) for b, n, c in zip(blocks, parts, chunk, strict=True) for i in range(n)]
    free = [0] * shape.programs
    for cost in np.repeat(costs, shape.kv_heads).tolist():
        heapq.heapreplace(free, free[0] + cost)
    return max(free) + parts.max() * shape.group / shape.block


RAGGED = np.random.default_rng(0).integers(1, 65, 100)
BATCHES = {f"{batch}x{blocks}": np.full(batch, blocks) for batch in (16, 64, 256) for blocks in (16, 64, 512)}
BATCHES |= {"ragged": RAGGED, "one_long": np.append(RAGGED // 4 + 1, 512), "single": np.array([512])}


@pytest.mark.parametrize("blocks", BATCHES.values(), ids=BATCHES)
def test_contexts_are_cut_as_well_as_by_the_best_length(blocks):
    """Llama-3-8B on an H200, in blocks of 64 keys."""
    blocks = np.sort(blocks)[::-1]
    shape = WorkShape(3 * 132, 0, 0, blocks.size + 297, block=64, max_blocks=512, kv_heads=8, group=4, window=None)
    planned = split(blocks, shape)
    lengths = {-(-blocks[0] // n) for n in range(1, 300)} | set(range(1, min(64, blocks[0])))
    candidates = (-(-blocks // length) for length in lengths)
    best = min(makespan(blocks, parts, shape) for parts in candidates if parts.sum() <= shape.decode_items)
    assert planned.sum() <= shape.decode_items
    assert makespan(blocks, planned, shape) <= 1.15 * best


@pytest.mark.parametrize("rows", [1, 4, 18])
def test_prefill_items_cover_every_row_once_with_most_keys_first(rows, rng):
    items = WORK_ROWS // rows + min(WORK_SEQS, WORK_ROWS // 2)
    shape = replace(decode_shape(8, WORK_SEQS), tile_rows=rows, prefill_items=items)
    build = jax.jit(lambda tiles: work_table(tiles, shape))
    for _ in range(6):
        length = rng.multinomial(WORK_ROWS, rng.dirichlet(np.full(WORK_SEQS, 0.3)))
        context = rng.integers(0, 100, WORK_SEQS)
        table, decode = live_items(build(work_tiles(context, length)), shape)
        assert (len(table), len(decode)) == count_items(length, context, shape)
        assert all(item["num_rows"] == WORK_ROWS for item in (*table, *decode))
        assert (np.diff([item["end"] for item in table]) <= 0).all()
        covered = []
        for item in table:
            row, count, seq, begin, end, *_ = item.values()
            assert count <= rows and end - begin == count and row - length[:seq].sum() == begin - context[seq]
            covered += range(row, row + count)
        owner = np.repeat(np.arange(WORK_SEQS), length)
        assert sorted(covered) == np.flatnonzero(length[owner] > 1).tolist()


def test_no_program_of_a_mixed_step_is_dead(rng):
    """A prompt and 127 decoding sequences, in Llama-3-8B's program for 4,096 rows of 256 sequences on an H200. One
    program per item of the table and head would be 5,648 blocks."""
    static = AttentionShape(32, 8, 128, 16, jnp.dtype("bfloat16"), 256, 2048, 4096, False)
    with compiling_for(DEVICES["h200"]):
        shape = WorkShape.of(static, triton_plan(static))
    length = np.append(np.ones(127, int), 3969)
    items = sum(count_items(length, rng.integers(0, 8192, 128), shape))
    assert shape.grid == 132 <= items * shape.kv_heads


def test_unsupported_shapes_are_refused_with_a_remedy(rng):
    step = Step(GROUP_OF_4, "bfloat16", [(3, 1)], True, rng)
    shape = static_shape(step)
    for changed, named in (
        (replace(shape, dtype=jnp.dtype("float32")), "float32"),
        (replace(shape, head_dim=24), "head_dim 24"),
        (replace(shape, num_heads=256), "128 query heads"),
    ):
        with pytest.raises(NotImplementedError, match=f"{named}.*implementation='xla'"):
            triton.Attention(step.tiles, changed, plan=PLAN, interpret=True)
    with pytest.raises(ValueError, match="22 rows, but the tiles are for at most 21"):
        triton.Attention(step.tiles, shape, plan=PLAN)(jnp.zeros((22, 8, 64), jnp.bfloat16), step.pool)


def test_the_device_decides_the_implementation(rng):
    step = Step(GROUP_OF_4, "bfloat16", [(3, 1)], True, rng)

    def kind(dtype):
        static = {"num_heads": 8, "num_kv_heads": 2, "head_dim": 64, "page_size": 16, "decode": True, "tile_rows": 1}
        return type(PagedAttention(step.tiles, dtype=dtype, **static)._attend)

    assert kind("bfloat16") is xla.Attention
    with compiling_for(DEVICES["h200"]):
        assert kind("bfloat16") is triton.Attention
        assert kind("float32") is xla.Attention
