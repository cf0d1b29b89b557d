"""Packing follows the layout row by row; everything else in the tiles is zero."""

import dataclasses
import time

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pallas_kernels.lora.layout import PROJECTIONS
from slora_jax.adapters import BaseGeometry, LoraAdapter, LoraConfig, pack_tiles, random_adapter, unpack_tiles
from slora_jax.errors import AdapterError, ConfigError

BF16 = ml_dtypes.bfloat16


def adapter_with_ranks(geometry, ranks, seed):
    """Returns an adapter of random weights with `ranks [num_layers, 7]`. Its config is a placeholder."""
    rng = np.random.default_rng(seed)
    a, b, scales = {}, {}, {}
    for layer, index in zip(*np.nonzero(ranks), strict=True):
        key, rank = (int(layer), PROJECTIONS[index]), int(ranks[layer, index])
        d_in, d_out = geometry.dims(key[1])
        a[key] = rng.standard_normal((rank, d_in), np.float32)
        b[key] = rng.standard_normal((d_out, rank), np.float32)
        scales[key] = float(rng.uniform(0.1, 3))
    return LoraAdapter(config=LoraConfig(), a=a, b=b, scales=scales, ranks=ranks)


GEOMETRIES = st.builds(
    BaseGeometry,
    num_layers=st.integers(1, 2),
    hidden_size=st.sampled_from([16, 40, 64]),
    q_width=st.sampled_from([32, 48, 80]),
    kv_width=st.sampled_from([8, 16, 32]),
    intermediate_size=st.sampled_from([24, 96]),
    page_size=st.sampled_from([8, 16, 32]),
)


@given(geometry=GEOMETRIES, data=st.data(), dtype=st.sampled_from(["float32", "bfloat16"]))
def test_unpacking_gives_back_every_row(geometry, data, dtype):
    rank = st.one_of(st.just(0), st.integers(0, 40))
    drawn = data.draw(st.lists(rank, min_size=7 * geometry.num_layers, max_size=7 * geometry.num_layers))
    ranks = np.array(drawn, np.int32).reshape(geometry.num_layers, 7)
    if not ranks.any():
        ranks[0, 0] = 1
    adapter = adapter_with_ranks(geometry, ranks, seed=data.draw(st.integers(0, 2**32 - 1)))
    tiles = pack_tiles(adapter, geometry, dtype)

    np.testing.assert_array_equal(tiles.ranks, ranks.max(axis=0))
    assert tiles.ranks.dtype == np.int32 and tiles.digest == adapter.digest
    element = np.dtype(BF16 if dtype == "bfloat16" else np.float32)
    shape = (geometry.num_layers, tiles.num_pages, 2, geometry.page_size, geometry.kv_width)
    assert tiles.pages.shape == shape and tiles.pages.dtype == element
    assert tiles.num_pages == -(-int(geometry.layout.num_tiles(tiles.ranks)) // 2)
    assert tiles.nbytes == int(np.prod(shape)) * element.itemsize

    nonzero = 0
    found = unpack_tiles(tiles, geometry)
    adapted = [PROJECTIONS[index] for index in np.flatnonzero(tiles.ranks)]
    assert found.keys() == {(layer, p) for layer in range(geometry.num_layers) for p in adapted}
    for (layer, projection), (a, b) in found.items():
        key, full = (layer, projection), int(tiles.ranks[PROJECTIONS.index(projection)])
        d_in, d_out = geometry.dims(projection)
        want_a, want_b = np.zeros((full, d_in), element), np.zeros((full, d_out), element)
        if key in adapter.a:
            own = len(adapter.a[key])
            want_a[:own] = adapter.a[key].astype(element)
            want_b[:own] = (adapter.b[key] * np.float32(adapter.scales[key])).T.astype(element)
        np.testing.assert_array_equal(a, want_a)
        np.testing.assert_array_equal(b, want_b)
        nonzero += np.count_nonzero(want_a) + np.count_nonzero(want_b)
    assert np.count_nonzero(tiles.pages) == nonzero  # the padding is zero


def test_rows_are_placed_by_the_layout(geometry):
    """Computed by hand: hidden 24 is two columns of W = 16; q has 9 rows, so k's first row is row 1 of block 1."""
    adapter = random_adapter(geometry, {"q": 9, "k": 2}, seed=1)
    tiles = pack_tiles(adapter, geometry, "float32").pages[2].reshape(-1, 8, 16)  # [tiles, page_size, W]
    # A: blocks 0 and 1, two chunks each -> tiles 0..3; B: both blocks hold rows of q -> two chunks each -> tiles 4..7.
    np.testing.assert_array_equal(tiles[2, 1], adapter.a[2, "k"][0, :16])
    np.testing.assert_array_equal(tiles[3, 1, :8], adapter.a[2, "k"][0, 16:])
    np.testing.assert_array_equal(tiles[6, 1], adapter.b[2, "k"][:, 0] * np.float32(adapter.scales[2, "k"]))
    assert not tiles[7, 1].any() and not tiles[3, :, 8:].any()
    np.testing.assert_array_equal(tiles[5, 7], adapter.b[2, "q"][16:, 7] * np.float32(adapter.scales[2, "q"]))


def test_scale_is_folded_before_the_cast(geometry):
    adapter = random_adapter(geometry, 4, targets=["q"], alpha=1.3)
    _, b = unpack_tiles(pack_tiles(adapter, geometry, "bfloat16"), geometry)[0, "q"]
    right = (adapter.b[0, "q"] * np.float32(adapter.scales[0, "q"])).astype(BF16).T
    wrong = (adapter.b[0, "q"].astype(BF16) * BF16(adapter.scales[0, "q"])).T
    np.testing.assert_array_equal(b, right)
    assert (b != wrong).any()


def test_dtype_is_accepted_in_any_form(geometry):
    adapter = random_adapter(geometry, 4)
    for dtype in ("bfloat16", BF16, np.dtype(BF16)):
        assert pack_tiles(adapter, geometry, dtype).pages.dtype == np.dtype(BF16)
    for dtype in ("float32", np.float32, np.dtype("float32")):
        assert pack_tiles(adapter, geometry, dtype).pages.dtype == np.float32
    with pytest.raises(ConfigError, match="float32 or bfloat16, found 'float16'"):
        pack_tiles(adapter, geometry, "float16")


def test_matrices_of_another_base_model_are_refused(geometry):
    wide = dataclasses.replace(geometry, intermediate_size=64)
    with pytest.raises(AdapterError, match=r"gate_proj: b expected \[40, 4\], found \[64, 4\]; .*another base model"):
        pack_tiles(random_adapter(wide, 4), geometry, "float32")
    deep = dataclasses.replace(geometry, num_layers=5)
    with pytest.raises(AdapterError, match=r"ranks: expected \[3, 7\], found \[5, 7\]"):
        pack_tiles(random_adapter(deep, 4), geometry, "float32")


@pytest.mark.parametrize("side", ["a", "b", "scale"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_values_that_are_not_finite_after_scaling_are_refused(geometry, dtype, side):
    adapter = random_adapter(geometry, 4)
    if side == "scale":
        adapter.b[1, "o"][3, 2] = 1e30
        adapter.scales[1, "o"] = 1e20
    else:
        getattr(adapter, side)[1, "o"][3, 2] = np.nan
    with pytest.raises(AdapterError, match=f"not finite in {dtype}"):
        pack_tiles(adapter, geometry, dtype)


def test_dims_of_every_projection(geometry):
    dims = [geometry.dims(projection) for projection in PROJECTIONS]
    assert dims == [(24, 32), (24, 16), (24, 16), (32, 24), (24, 40), (24, 40), (40, 24)]
    with pytest.raises(ConfigError, match="unknown projection 'q_proj'"):
        geometry.dims("q_proj")
    with pytest.raises(ConfigError, match=r"BaseGeometry.page_size=0: must be an integer of at least 1"):
        dataclasses.replace(geometry, page_size=0)


def test_packing_takes_milliseconds():
    """Rank 16 on every projection of 12 layers of width 768; processor time, because test machines are shared."""
    geometry = BaseGeometry(12, 768, 768, 768, 3072, 16)
    adapter = random_adapter(geometry, 16)
    times = []
    for _ in range(5):
        begin = time.thread_time()
        pack_tiles(adapter, geometry, "bfloat16")
        times.append(time.thread_time() - begin)
    assert min(times) < 0.05, times
