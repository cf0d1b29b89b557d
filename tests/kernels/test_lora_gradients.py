"""The gradients of the gathered product against dense float64 matrices, in a pool whose free pages are NaN."""

from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_lora_product import GQA, MHA, SLOTS, TILE_ROWS, WIDE, Adapters, in_pages, weight_tiles

from pallas_kernels.lora import LoraTiles
from pallas_kernels.lora.training import TrainedLora, training_tile_rows

TILES = 7
ORDER = [0, 0, 2, 1, 3, 3]
"""The adapters of the tiles; adapter 1 has a single projection."""
HIGH = replace(GQA, max_rank=64)


def tiles_of(slots):
    """Tiles of `TILE_ROWS` rows each for `slots`; the entries after them name slot 0, which has no rows."""
    padded = np.zeros(TILES, np.int32)
    padded[: len(slots)] = slots
    first = np.arange(TILES, dtype=np.int32) * TILE_ROWS
    none = jnp.int32(0)
    return LoraTiles(
        padded, first, np.full(TILES, TILE_ROWS), jnp.zeros(0, int), np.int32(len(slots)), none, none, none
    )


@partial(jax.jit, static_argnames=("layout", "max_rank", "implementation"))
def gradients(table, tiles, pool, xs, ys, slopes, before, layout, max_rank, implementation):
    """dx of every stack, and `before` plus the gradient of the pool."""
    lora = TrainedLora(
        layout, table, tiles, dtype=pool.dtype, tile_rows=TILE_ROWS, max_rank=max_rank,
        implementation=implementation, interpret=True,
    )  # fmt: skip

    def products(xs, ledger):
        outputs = []
        for x, y, stack in zip(xs, ys, layout.stacks, strict=True):
            y, ledger = lora(x, y, pool, ledger, stack)
            outputs.append(y)
        return outputs, ledger

    return jax.vjp(products, xs, jnp.zeros_like(before))[1]((slopes, before))


def inputs(adapters, rng):
    """Inputs, outputs and the outputs' gradients of every stack, and what the pool's gradient holds before."""
    xs, ys = adapters.inputs(TILES * TILE_ROWS)
    slopes = [rng.standard_normal(y.shape).astype(adapters.dtype) for y in ys]
    return xs, ys, slopes, rng.standard_normal(adapters.pool.shape).astype(np.float32)


@pytest.mark.parametrize(
    ("shape", "dtype", "implementation", "tolerance"),
    [
        (GQA, "float32", "xla", 1e-5),
        (WIDE, "bfloat16", "xla", 5e-3),
        (HIGH, "bfloat16", "triton", 5e-3),
        (MHA, "float16", "triton", 1e-3),
        (WIDE, "bfloat16", "triton", 5e-3),
    ],
)
def test_gradients_equal_those_of_dense_matrices(shape, dtype, implementation, tolerance, rng) -> None:
    """dx, and dA and dB added to what the gradient's array held, of adapters with one and with several tiles. The rows
    of the last tile have no adapter; other tiles' gradients, free pages' included, keep their bits."""
    adapters = Adapters(shape, dtype, rng)
    slots = adapters.slots[ORDER].tolist()
    xs, ys, slopes, before = inputs(adapters, rng)
    static = {"layout": adapters.layout, "max_rank": shape.max_rank, "implementation": implementation}
    dxs, after = gradients(adapters.table, tiles_of(slots), adapters.pool, xs, ys, slopes, before, **static)
    expected = before.astype(float)
    want_dx = [np.zeros(x.shape) for x in xs]
    for slot in set(slots):
        matrices = adapters.matrices[slot]
        own = np.repeat([s == slot for s in slots] + [False], TILE_ROWS)
        change = {}
        for x, slope, dx, stack in zip(xs, slopes, want_dx, adapters.layout.stacks, strict=True):
            for p, at, d in zip(stack.projections, stack.columns, stack.d_outs, strict=True):
                if p in matrices:
                    a, b = matrices[p]
                    x_own, dy = x[own].astype(float), slope[own, at : at + d].astype(float)
                    dx[own] += dy @ b.T @ a
                    change[p] = (dy @ b.T).T @ x_own, (x_own @ a.T).T @ dy
        pages = in_pages(weight_tiles(adapters.layout, change))
        expected[np.asarray(adapters.table.pages)[slot][: len(pages)]] += pages
    for dx, want in zip(dxs, want_dx, strict=True):
        assert dx.dtype == adapters.dtype
        np.testing.assert_allclose(np.asarray(dx, float), want, atol=tolerance * np.abs(want).max())
    np.testing.assert_allclose(after[1:], expected[1:], atol=tolerance * np.abs(expected).max())
    untouched = (expected == before).all(axis=(1, 2, 3))
    assert untouched.sum() > SLOTS
    np.testing.assert_array_equal(np.asarray(after)[untouched][1:], before[untouched][1:])


@pytest.mark.parametrize(("dtype", "implementation"), [("float32", "xla"), ("bfloat16", "triton")])
def test_an_adapter_gets_the_same_bits_alone_and_with_others(dtype, implementation, rng) -> None:
    """Alone, its rows are at another place of the step."""
    adapters = Adapters(MHA, dtype, rng)
    run = partial(gradients, layout=adapters.layout, max_rank=MHA.max_rank, implementation=implementation)
    xs, ys, slopes, before = inputs(adapters, rng)
    slots = adapters.slots[ORDER].tolist()
    dxs, after = run(adapters.table, tiles_of(slots), adapters.pool, xs, ys, slopes, before)
    at = ORDER.index(3) * TILE_ROWS
    xs, ys, slopes = ([np.roll(part, -at, 0) for part in parts] for parts in (xs, ys, slopes))
    alone, own = run(adapters.table, tiles_of(slots[4:]), adapters.pool, xs, ys, slopes, before)
    for dx, other in zip(dxs, alone, strict=True):
        np.testing.assert_array_equal(dx[at : at + 2 * TILE_ROWS], other[: 2 * TILE_ROWS])
    pages = np.asarray(adapters.table.pages)[slots[4]]
    np.testing.assert_array_equal(np.asarray(after)[pages[pages > 0]], np.asarray(own)[pages[pages > 0]])


def test_tiles_divide_the_rows_of_a_micro_step() -> None:
    layout = GQA.layout
    assert [training_tile_rows(layout, "float32", length) for length in (96, 512, 1536)] == [96, 512, 512]
    assert [training_tile_rows(layout, "bfloat16", n, "triton") for n in (16, 96, 2048)] == [16, 32, 64]
    with pytest.raises(NotImplementedError, match="no implementation named 'bmm'; available: 'xla', 'triton'"):
        training_tile_rows(layout, "bfloat16", 64, "bmm")
