"""Paged attention against float64 NumPy, in a pool that is NaN outside the sequences' tokens."""

from dataclasses import dataclass
from functools import cache, partial

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from pallas_kernels.kv_format import ScaledPages, decode, encode
from pallas_kernels.paged_attention import AttentionTiles, paged_attention

SEEDS = range(6)
MOST_TOKENS = 200
DECODE_SEQS, MIXED_SEQS = 21, 7


@dataclass(frozen=True)
class Shape:
    """Heads, page size, and the rows of a mixed step and of its prefill tiles."""

    heads: int
    kv_heads: int
    head_dim: int
    page_size: int
    mixed_rows: int = 75
    tile_rows: int = 16

    @property
    def max_pages(self) -> int:
        """One more than the longest sequence fills, and no multiple of what the kernel reads at once."""
        return -(-MOST_TOKENS // self.page_size) + 1


MULTI_HEAD = Shape(heads=4, kv_heads=4, head_dim=16, page_size=8, mixed_rows=16)
GROUPED = Shape(heads=4, kv_heads=2, head_dim=64, page_size=16)
ONE_KV_HEAD = Shape(heads=4, kv_heads=1, head_dim=128, page_size=32)
ODD = Shape(heads=6, kv_heads=2, head_dim=24, page_size=16, tile_rows=9)

# (shape, dtype, decode): every shape, dtype and regime, without their product. After "+": of keys and values.
CASES = {
    "multi_head_decode": (MULTI_HEAD, "float32", True),
    "multi_head_mixed": (MULTI_HEAD, "float32", False),
    "grouped_decode": (GROUPED, "float32", True),
    "grouped_mixed": (GROUPED, "float32", False),
    "grouped_bf16_decode": (GROUPED, "bfloat16", True),
    "one_kv_head_decode": (ONE_KV_HEAD, "float32", True),
    "odd_decode": (ODD, "float32", True),
    "odd_bf16_mixed": (ODD, "bfloat16", False),
    "odd_fp8_decode": (ODD, "float32+fp8", True),
    "grouped_fp8_mixed": (GROUPED, "float32+fp8", False),
    "multi_head_int8_decode": (MULTI_HEAD, "float32+int8", True),
    "odd_int8_mixed": (ODD, "bfloat16+int8", False),
}


@cache
def attention(shape: Shape, decode: bool):
    return jax.jit(partial(paged_attention, num_kv_heads=shape.kv_heads, decode=decode, tile_rows=shape.tile_rows))


class Step:
    """Sequences `(context, length)` of one step: rows, queries, and keys and values in pages in random order."""

    def __init__(
        self, shape: Shape, dtype: str, sequences: list[tuple[int, int]], decode: bool, rng: np.random.Generator
    ) -> None:
        self.shape, self.sequences, self.decode = shape, sequences, decode
        dtype, _, kv_dtype = dtype.partition("+")
        self.dtype = np.dtype(ml_dtypes.bfloat16 if dtype == "bfloat16" else dtype)
        self.rows, seqs = (DECODE_SEQS, DECODE_SEQS) if decode else (shape.mixed_rows, MIXED_SEQS)
        size, width, dim = shape.page_size, shape.kv_heads * shape.head_dim, shape.head_dim

        def normal(*shape: int) -> np.ndarray:
            return rng.standard_normal(shape).astype(self.dtype)

        self.q = 3 * normal(self.rows, shape.heads, dim)
        self.keys = [normal(context + length, width) for context, length in sequences]
        self.values = [normal(context + length, width) for context, length in sequences]

        num_pages = 1 + seqs * shape.max_pages
        pool = np.full((num_pages, 2, size, width), np.nan, self.dtype)
        pool[0] = 1e30  # the dummy page: any finite garbage
        free = (1 + rng.permutation(num_pages - 1)).tolist()
        table = rng.integers(0, num_pages, (seqs, shape.max_pages))  # stale entries past a sequence's end
        for seq, (keys, values) in enumerate(zip(self.keys, self.values, strict=True)):
            for position in range(len(keys)):
                if position % size == 0:
                    table[seq, position // size] = free.pop()
                page = table[seq, position // size]
                pool[page, :, position % size] = keys[position], values[position]
        self.pool = jnp.asarray(pool)
        if kv_dtype:
            self._narrow(kv_dtype, table)
        self.tiles = self._tiles(table, seqs, rng)

    def _narrow(self, kv_dtype: str, table: np.ndarray) -> None:
        """Converts the pool. The keys and values become what it then holds."""
        (num_pages, _, size, width), heads = self.pool.shape, self.shape.kv_heads
        empty = jnp.zeros((0, 2, size // 2, width), jnp.uint16)
        template = ScaledPages(empty, jnp.zeros((0, 2, size, heads), jnp.bfloat16)) if kv_dtype == "int8" else empty
        rows, scales = encode(self.pool, template)
        wide, held = np.asarray(self.pool, float), np.asarray(decode(rows, kv_dtype, jnp.float32), float)
        pages = rows.reshape(num_pages, *empty.shape[1:])
        self.pool = pages if scales is None else ScaledPages(pages, scales)
        if scales is not None:
            scale = np.repeat(np.asarray(scales, float), width // heads, axis=-1)
            held *= scale
        rounding = 2.0**-4 * abs(wide) + 2.0**-10 if scales is None else 0.51 * scale
        assert (abs(held - wide) <= rounding)[1:][~np.isnan(wide[1:])].all()
        for seq, keys in enumerate(self.keys):
            position = np.arange(len(keys))
            found = held[table[seq, position // size], :, position % size]  # [t, 2, W]
            self.keys[seq], self.values[seq] = found.swapaxes(0, 1)

    def _tiles(self, table: np.ndarray, seqs: int, rng: np.random.Generator) -> AttentionTiles:
        context, length = np.zeros((2, seqs), np.int32)  # padding sequences have neither rows nor context
        n = len(self.sequences)
        if n:
            context[:n], length[:n] = np.transpose(self.sequences)
        first_row = np.where(length > 0, np.cumsum(length) - length, 0)
        one = sorted(np.flatnonzero(length == 1).tolist(), key=lambda s: -context[s])
        decode_seq = rng.integers(0, seqs, seqs)
        decode_seq[: len(one)] = one
        prefill = [(s, row) for s in np.flatnonzero(length > 1) for row in range(0, length[s], self.shape.tile_rows)]
        entries = rng.integers(
            0, seqs, (0 if self.decode else len(range(0, self.rows, self.shape.tile_rows)) + seqs, 2)
        )
        if prefill:
            entries[: len(prefill)] = prefill
        arrays = (table, first_row, length, context, *entries.T, len(prefill), decode_seq, len(one))
        return AttentionTiles(*(jnp.asarray(a, jnp.int32) for a in arrays))

    def run(self) -> np.ndarray:
        out = attention(self.shape, self.decode)(self.q, self.pool, self.tiles)
        assert out.dtype == self.dtype and out.shape == self.q.shape
        return np.asarray(out)

    def check(self) -> None:
        out, row = self.run(), 0
        for seq, (context, length) in enumerate(self.sequences):
            for position in range(context, context + length):
                expected, bound = self._row(self.q[row], self.keys[seq], self.values[seq], position, length > 1)
                error = abs(out[row].astype(float) - expected)
                assert (error <= bound).all(), (seq, position, length, (error / bound).max(), np.isnan(error).any())
                row += 1
        np.testing.assert_array_equal(out[row:], np.zeros_like(out[row:]))

    def _row(
        self, q: np.ndarray, keys: np.ndarray, values: np.ndarray, position: int, tiled: bool
    ) -> tuple[np.ndarray, np.ndarray]:
        """The row's output `[H, head_dim]` in float64, and the error that the dtype allows: 1e-5 of the sum of absolute
        terms and one rounding of the result; in prefill tiles also a rounding of each scaled query and probability."""
        shape, group = self.shape, self.shape.heads // self.shape.kv_heads
        q = q.astype(float) * shape.head_dim**-0.5
        heads = (-1, shape.kv_heads, shape.head_dim)
        k = np.repeat(keys[: position + 1].astype(float).reshape(heads), group, 1)  # [t, H, hd]
        v = np.repeat(values[: position + 1].astype(float).reshape(heads), group, 1)
        scores = np.einsum("hd,thd->th", q, k)
        p = np.exp(scores - scores.max(0))
        p /= p.sum(0)
        expected = np.einsum("th,thd->hd", p, v)
        terms = np.einsum("th,thd->hd", p, abs(v))
        relative, rounding = 1e-5, 0.0
        if self.dtype == ml_dtypes.bfloat16:
            rounding = 2.0**-8
            if tiled:
                q_error = abs(q - q.astype(self.dtype).astype(float))
                score_error = np.einsum("hd,thd->th", q_error, abs(k)).max(0)
                relative = (relative + np.expm1(2 * score_error) + rounding)[:, None]
        return expected, relative * terms + rounding * abs(expected)


def random_sequences(shape: Shape, decode: bool, rng: np.random.Generator) -> list[tuple[int, int]]:
    """Contexts and lengths on, around and off the borders of pages and tiles; some rows and sequences stay padding."""
    size, tile = shape.page_size, shape.tile_rows

    def context(length: int) -> int:
        border = rng.choice([0, size - 1, size, 128 - length, 128, MOST_TOKENS - length])
        return int(rng.choice([border, rng.integers(0, MOST_TOKENS - length + 1)]))

    if decode:
        return [(context(1), 1) for _ in range(rng.integers(1, DECODE_SEQS + 1))]
    sequences, rows = [], shape.mixed_rows
    for length in rng.choice([1, 2, size, tile - 1, tile, tile + 1, 2 * tile + 3], MIXED_SEQS).tolist():
        length = min(length, rows)
        rows -= length
        if length:
            sequences.append((context(length), length))
    return sequences[: rng.integers(1, MIXED_SEQS + 1)]


@pytest.mark.parametrize(("shape", "dtype", "decode"), CASES.values(), ids=CASES)
def test_each_row_attends_to_its_own_sequence_up_to_itself(shape, dtype, decode):
    for seed in SEEDS:
        rng = np.random.default_rng(seed)
        sequences = random_sequences(shape, decode, rng)
        print(f"seed {seed}: (context, length) {sequences}")
        Step(shape, dtype, sequences, decode, rng).check()


def test_a_prompt_longer_than_a_tile_between_decoding_sequences():
    sequences = [(199, 1), (0, 1), (50, 37), (31, 1), (0, 16), (128, 1), (15, 18)]
    Step(GROUPED, "float32", sequences, False, np.random.default_rng(20)).check()


@pytest.mark.parametrize("decode", [True, False], ids=["decode", "mixed"])
def test_every_context_from_one_token_up(decode):
    rng = np.random.default_rng(21)
    for first in range(1, 80, 20):
        contexts = range(first, first + (20 if decode else MIXED_SEQS))
        Step(GROUPED, "float32", [(c - 1, 1) for c in contexts], decode, rng).check()


@pytest.mark.parametrize("decode", [True, False], ids=["decode", "mixed"])
def test_a_step_of_padding_only_is_zero(decode):
    assert not Step(GROUPED, "float32", [], decode, np.random.default_rng(22)).run().any()


@pytest.mark.parametrize("decode", [True, False], ids=["decode", "mixed"])
def test_large_scores_neither_overflow_nor_vanish(decode):
    sequences = [(180, 1), (3, 1)] if decode else [(180, 20), (3, 1)]
    step = Step(GROUPED, "float32", sequences, decode, np.random.default_rng(23))
    step.q = np.sign(step.q) * np.float32(2.0**10)  # scores of several thousand: one key takes all
    out, row = step.run(), 0
    for seq, (context, length) in enumerate(sequences):
        for position in range(context, context + length):
            expected, _ = step._row(step.q[row], step.keys[seq], step.values[seq], position, length > 1)
            np.testing.assert_allclose(out[row], expected, rtol=0, atol=2e-2)
            row += 1


@pytest.mark.parametrize("decode", [True, False], ids=["decode", "mixed"])
def test_queries_and_pool_may_differ_in_dtype(decode):
    step = Step(ODD, "bfloat16", [(40, 1), (0, 1)], decode, np.random.default_rng(24))
    out = attention(ODD, decode)(jnp.asarray(step.q, jnp.float32), step.pool, step.tiles)
    assert out.dtype == jnp.float32
    np.testing.assert_allclose(out[:2], step.run()[:2].astype(np.float32), rtol=2**-7)


def test_an_unknown_implementation_is_refused_by_name():
    step = Step(MULTI_HEAD, "float32", [(3, 1)], True, np.random.default_rng(25))
    with pytest.raises(NotImplementedError, match="no implementation named 'flash'"):
        paged_attention(step.q, step.pool, step.tiles, num_kv_heads=4, decode=True, tile_rows=1, implementation="flash")
