"""The gradients of the gathered product against dense float64 matrices, in a pool whose free pages are NaN."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_lora_product import GQA, SLOTS, TILE_ROWS, WIDE, Adapters

from pallas_kernels.lora import LoraTiles
from pallas_kernels.lora.training import TrainedLora

TILES = 6


@pytest.mark.parametrize(("shape", "dtype", "tolerance"), [(GQA, "float32", 1e-5), (WIDE, "bfloat16", 2e-2)])
def test_gradients_equal_those_of_dense_matrices(shape, dtype, tolerance, rng) -> None:
    """dx, and dA and dB added to what the gradient's array held, of adapters with one and with several tiles. The rows
    of the last tile have no adapter; other tiles' gradients, free pages' included, keep their bits."""
    adapters = Adapters(shape, dtype, rng)
    layout, slots = adapters.layout, [*adapters.slots[[0, 0, 2, 3, 3]].tolist(), 0]
    rows = TILES * TILE_ROWS
    xs, ys = adapters.inputs(rows)
    slopes = [rng.standard_normal(y.shape).astype(adapters.dtype) for y in ys]
    tiles = LoraTiles(
        slot=jnp.array(slots), first_row=jnp.arange(TILES) * TILE_ROWS, rows=jnp.full(TILES, TILE_ROWS),
        row_slot=jnp.zeros(0, int), num_tiles=jnp.int32(TILES - 1), num_dense=jnp.int32(0), dense_rows=jnp.int32(0),
        lora_rows=jnp.int32(0),
    )  # fmt: skip
    before = rng.standard_normal(adapters.pool.shape).astype(np.float32)

    @jax.jit
    def gradients(xs, ys, slopes, before):
        lora = TrainedLora(layout, adapters.table, tiles, tile_rows=TILE_ROWS, max_rank=shape.max_rank)

        def products(xs, ledger):
            outputs = []
            for x, y, stack in zip(xs, ys, layout.stacks, strict=True):
                y, ledger = lora(x, y, adapters.pool, ledger, stack)
                outputs.append(y)
            return outputs, ledger

        return jax.vjp(products, xs, jnp.zeros_like(before))[1]((slopes, before))

    dxs, after = gradients(xs, ys, slopes, before)
    expected = before.astype(float)
    want_dx = [np.zeros(x.shape) for x in xs]
    for slot in set(slots[:-1]):
        matrices = adapters.matrices[slot]
        own = np.repeat([s == slot for s in slots[:-1]] + [False], TILE_ROWS)
        change = {}
        for x, slope, dx, stack in zip(xs, slopes, want_dx, layout.stacks, strict=True):
            for p, at, d in zip(stack.projections, stack.columns, stack.d_outs, strict=True):
                if p in matrices:
                    a, b = matrices[p]
                    x_own, dy = x[own].astype(float), slope[own, at : at + d].astype(float)
                    dx[own] += dy @ b.T @ a
                    change[p] = (dy @ b.T).T @ x_own, (x_own @ a.T).T @ dy
        pages = adapters._pack(change)
        expected[np.asarray(adapters.table.pages)[slot][: len(pages)]] += pages
    for dx, want in zip(dxs, want_dx, strict=True):
        assert dx.dtype == adapters.dtype
        np.testing.assert_allclose(np.asarray(dx, float), want, atol=tolerance * np.abs(want).max())
    np.testing.assert_allclose(after[1:], expected[1:], atol=tolerance * np.abs(expected).max())
    untouched = (expected == before).all(axis=(1, 2, 3))
    assert untouched.sum() > SLOTS
    np.testing.assert_array_equal(np.asarray(after)[untouched][1:], before[untouched][1:])
