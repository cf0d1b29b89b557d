"""Vectors and ends of adapters, from packed tiles at any pages of a pool, against float64 NumPy."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.lora import AdapterTable, LoraTiles, ends, vectors
from slora_jax.adapters import BaseGeometry, pack_tiles, random_adapter

GEOMETRY = BaseGeometry(
    num_layers=2, hidden_size=24, q_width=32, kv_width=16, intermediate_size=40, page_size=8, vocab_size=70
)  # widths that W does not divide
LAYER, T = 1, 7


class Base:
    """Random weights `[d_out, d_in]` and biases of a base model."""

    def __init__(self, rng):
        self.weights = {p: rng.standard_normal(GEOMETRY.dims(p)[::-1]).astype(np.float32) for p in ("q", "v", "down")}
        self.biases = {"q": rng.standard_normal(32).astype(np.float32)}

    def row_norms(self, layer, projection, a, b):
        return np.linalg.norm(self.weights[projection] + b @ a, axis=1)

    def bias(self, layer, projection):
        return self.biases.get(projection)


def placed(packed, rng):
    """Puts adapters at any pages of every layer's pool. Returns the pools, float32, and the table."""
    free, pools = rng.permutation(np.arange(1, 200)), rng.standard_normal((GEOMETRY.num_layers, 200, 2, 8, 16))
    pages, ranks = np.zeros((len(packed), 60), np.int32), np.zeros((len(packed), 10), np.int32)
    for slot, tiles in enumerate(packed):
        pages[slot, : tiles.num_pages], free = free[: tiles.num_pages], free[tiles.num_pages :]
        pools[:, pages[slot, : tiles.num_pages]] = tiles.pages
        ranks[slot, : tiles.ranks.size] = tiles.ranks
    return pools, AdapterTable(jnp.asarray(pages), jnp.asarray(ranks))


NONE = jnp.zeros(1, jnp.int32)
ROW_SLOT = jnp.array([0, 0, 1, 2, 2, 0, 0], jnp.int32)  # the last row has no adapter
STEP = LoraTiles(NONE, NONE, NONE, ROW_SLOT, *(jnp.int32(n) for n in (0, 0, 0, T - 1)))


def held(layer: np.ndarray, dtype: str) -> jax.Array:
    """A layer's pool; bfloat16 as the bits that lie beside narrow keys and values (`kv_format`)."""
    pool = jnp.asarray(layer, dtype)
    return pool if dtype == "float32" else jax.lax.bitcast_convert_type(pool, jnp.uint16)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_head_and_embedding_change_the_rows_of_their_adapter_only(rng, dtype):
    layout, plain = GEOMETRY.layout, random_adapter(GEOMETRY, {"q": 3}, seed=1)

    def end(rank, d_in, d_out):
        return tuple(rng.standard_normal(shape).astype(np.float32) / 4 for shape in ((rank, d_in), (d_out, rank)))

    head, embed = end(19, 24, 70), end(17, 70, 24)
    both = dataclasses.replace(plain, ends={"head": head, "embed": embed})
    packed = [
        pack_tiles(one, GEOMETRY, dtype) for one in (both, plain, dataclasses.replace(plain, ends={"head": head}))
    ]
    pools, table = placed(packed, rng)
    pool = [held(layer, dtype) for layer in pools]
    last_row, length = jnp.array([1, 2, 4, 5, 6, 0]), jnp.array([2, 1, 2, 1, 1, 0])  # the last sequence is padding
    rows = ends.prepare(layout, table, STEP, last_row, length, max_rank=32)
    tolerance = 1e-5 if dtype == "float32" else 0.05

    tokens = np.array([0, 69, 35, 3, 5, 47, 48])
    x = jnp.asarray(rng.standard_normal((T, 24)), dtype)
    expected = np.asarray(x, np.float64)
    for row in (0, 1, 5):
        expected[row] += embed[1].astype(np.float64) @ embed[0][:, tokens[row]]
    found = ends.add_embedding(jnp.asarray(tokens), x, pool, layout, rows)
    np.testing.assert_allclose(np.asarray(found, np.float64), expected, rtol=tolerance, atol=tolerance)
    np.testing.assert_array_equal(np.asarray(found)[[2, 3, 4, 6]], np.asarray(x)[[2, 3, 4, 6]])

    hidden, logits = x[last_row], jnp.asarray(rng.standard_normal((6, 70)), jnp.float32)
    expected = np.asarray(logits, np.float64)
    for sequence in (0, 2, 3):
        expected[sequence] += head[1].astype(np.float64) @ (head[0] @ np.asarray(hidden[sequence], np.float64))
    found = ends.add_head(hidden, logits, pool, layout, rows)
    np.testing.assert_allclose(np.asarray(found, np.float64), expected, rtol=tolerance, atol=tolerance)
    np.testing.assert_array_equal(np.asarray(found)[[1, 4, 5]], np.asarray(logits)[[1, 4, 5]])


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_vectors_scale_and_shift_the_rows_of_their_adapter_only(rng, dtype):
    base, layout = Base(rng), GEOMETRY.layout
    plain = random_adapter(GEOMETRY, {"q": 3, "v": 9, "down": 4}, seed=1)
    vector = {key: rng.uniform(0.5, 1.5, GEOMETRY.dims(key[1])[1]).astype(np.float32) for key in plain.a}
    biases = {key: rng.standard_normal(32).astype(np.float32) for key in plain.a if key[1] == "q"}
    dora = dataclasses.replace(plain, magnitudes=vector, base_biases=biases)
    biased = dataclasses.replace(plain, lora_biases=vector)
    packed = [pack_tiles(adapter, GEOMETRY, dtype, base) for adapter in (dora, plain, biased)]

    pools, table = placed(packed, rng)
    rows = vectors.prepare(layout, table, STEP)
    pool = pools[LAYER]

    for stack in layout.stacks:
        y = rng.standard_normal((T, stack.d_out)).astype(np.float32)
        found = vectors.apply(jnp.asarray(y, dtype), held(pool, dtype), stack, layout, rows)
        expected = y.astype(np.float64)
        for projection, first, d_out in zip(stack.projections, stack.columns, stack.d_outs, strict=True):
            key, own = (LAYER, projection), slice(first, first + d_out)
            if key not in plain.a:
                continue
            update = plain.scales[key] * plain.b[key].astype(np.float64) @ plain.a[key]
            old = base.biases.get(projection, 0)
            g = vector[key] / np.linalg.norm(base.weights[projection] + update, axis=1)
            for row in (0, 1, 5):
                expected[row, own] = g * (y[row, own] - old) + biases.get(key, old)
            expected[3:5, own] = y[3:5, own] + plain.scales[key] * vector[key]
        tolerance = 1e-5 if dtype == "float32" else 0.05
        np.testing.assert_allclose(np.asarray(found, np.float64), expected, rtol=tolerance, atol=tolerance)
        np.testing.assert_array_equal(np.asarray(found)[[2, 6]], np.asarray(jnp.asarray(y, dtype))[[2, 6]])
