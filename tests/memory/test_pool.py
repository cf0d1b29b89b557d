"""The pool's arrays, and uploads: an adapter's pages arrive as they are, and no other page changes."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from tiny_model import TinyModel

from slora_jax import EngineConfig
from slora_jax.engine import sizing
from slora_jax.errors import ConfigError
from slora_jax.memory import PoolShape, upload_adapter
from slora_jax.memory.pool import UPLOAD_PAGES, upload_layer, upload_layers

SHAPE = PoolShape(
    num_layers=3, num_pages=90, page_size=8, width=6, dtype="float32", adapter_slots=5, max_adapter_pages=75
)


def shape_of(dtype: str) -> PoolShape:
    return PoolShape(**(vars(SHAPE) | {"dtype": dtype}))


def garbage(shape: PoolShape, rng: np.random.Generator) -> tuple[list[np.ndarray], np.ndarray, np.ndarray]:
    """A pool's layers, a table's pages and ranks, all in use already."""
    dtype = ml_dtypes.bfloat16 if shape.dtype == "bfloat16" else shape.dtype
    layers = [rng.standard_normal(s.shape).astype(dtype) for s in shape.pool_struct()]
    pages = rng.integers(0, shape.num_pages, (shape.adapter_slots, shape.max_adapter_pages)).astype(np.int32)
    return layers, pages, rng.integers(0, 9, (shape.adapter_slots, 7)).astype(np.int32)


def test_shapes_bytes_and_zeros():
    shape = shape_of("bfloat16")
    pool, table = shape.make_pool(), shape.make_table()
    assert len(pool) == 3 and all(layer.shape == (90, 2, 8, 6) and layer.dtype == jnp.bfloat16 for layer in pool)
    assert shape.page_bytes * shape.num_pages == sum(layer.nbytes for layer in pool)
    assert SHAPE.page_bytes == 2 * shape.page_bytes
    assert table.pages.shape == (5, 75) and table.ranks.shape == (5, 10)
    assert not any(np.asarray(leaf).any() for leaf in jax.tree.leaves((pool, table)))
    assert jax.tree.map(lambda a: (a.shape, a.dtype), (pool, table)) == jax.tree.map(
        lambda a: (a.shape, a.dtype), (shape.pool_struct(), shape.table_struct())
    )


def test_narrow_keys_and_values_halve_a_page(monkeypatch):
    """With fp8 the same memory holds twice the tokens; int8 adds 2 bytes to each head of 64."""
    wide = PoolShape(2, 90, 16, 128, "bfloat16", 5, 9)
    fp8, int8 = (replace(wide, kv_dtype=kind, head_dim=64) for kind in ("fp8", "int8"))
    assert 2 * fp8.page_bytes == wide.page_bytes and int8.page_bytes * 64 == fp8.page_bytes * 66
    for shape in (fp8, int8):
        held = sum(leaf.nbytes for leaf in jax.tree.leaves(shape.make_pool()))
        assert shape.page_bytes * shape.num_pages == held
    monkeypatch.setattr(sizing, "_free_memory", lambda *_: (1 << 30, "test memory"))
    tiny, config = TinyModel().config, EngineConfig(dtype="bfloat16", page_size=16, progress=False)
    assert sizing.pages_that_fit(tiny, replace(config, kv_dtype="fp8")) == 2 * sizing.pages_that_fit(tiny, config)
    for field, value in (("page_size", 8), ("lora", "bmm"), ("kernels", "mosaic_gpu")):
        with pytest.raises(ConfigError, match=f"{field}='?{value}"):
            replace(config, kv_dtype="int8", **{field: value})


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_upload_writes_only_its_pages_and_its_table_row(dtype):
    """1 to 70 pages: multiples of the upload sizes, one less, one more, and all between."""
    shape = shape_of(dtype)
    for count in range(1, 71):
        print(f"seed {count}")
        rng = np.random.default_rng(count)
        layers, table_pages, table_ranks = garbage(shape, rng)
        pool, table = tuple(map(jnp.array, layers)), shape.make_table()
        table = type(table)(jnp.array(table_pages), jnp.array(table_ranks))
        contents = rng.standard_normal((3, count, 2, 8, 6)).astype(layers[0].dtype)
        ids = (1 + rng.permutation(shape.num_pages - 1)[:count]).astype(np.int32)
        slot, ranks = int(rng.integers(shape.adapter_slots)), rng.integers(0, 99, 7).astype(np.int32)

        pool, table = upload_adapter(pool, table, slot, ids, ranks, contents)

        for layer, found, new in zip(layers, pool, contents, strict=True):
            layer[ids] = new
            np.testing.assert_array_equal(np.asarray(found).view(np.uint8), layer.view(np.uint8))
        table_pages[slot, :count], table_pages[slot, count:] = ids, 0
        table_ranks[slot] = ranks
        np.testing.assert_array_equal(table.pages, table_pages)
        np.testing.assert_array_equal(table.ranks, table_ranks)


def test_upload_donates_the_pool_and_the_table():
    pool, table = SHAPE.make_pool(), SHAPE.make_table()
    addresses = [layer.unsafe_buffer_pointer() for layer in pool]
    ids = np.arange(1, 6, dtype=np.int32)
    new_pool, _ = upload_adapter(pool, table, 0, ids, np.ones(7, np.int32), np.ones((3, 5, 2, 8, 6), np.float32))
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves((pool, table)))
    assert [layer.unsafe_buffer_pointer() for layer in new_pool] == addresses


def test_upload_sizes_share_one_program():
    shape = PoolShape(**(vars(SHAPE) | {"width": 5}))  # no other test's
    pool, table = shape.make_pool(), shape.make_table()
    before = upload_layer._cache_size()
    for count in (70, 1, 2, 3, 5, 31, 32, 33):
        contents = np.ones((3, count, 2, 8, 5), np.float32)
        pool, table = upload_adapter(
            pool, table, count % 5, np.arange(1, count + 1, dtype=np.int32), np.ones(7, np.int32), contents
        )
    assert upload_layer._cache_size() - before == len(UPLOAD_PAGES)


@pytest.mark.parametrize("size", UPLOAD_PAGES)
def test_the_program_that_uploads_to_all_layers_aliases_every_one(size):
    pages = jax.ShapeDtypeStruct((size,), jnp.int32)
    contents = jax.ShapeDtypeStruct((3, size, 2, 8, 6), jnp.float32)
    compiled = upload_layers.lower(SHAPE.pool_struct(), pages, contents).compile()
    nbytes = SHAPE.num_pages * SHAPE.page_bytes
    assert compiled.memory_analysis().alias_size_in_bytes == nbytes
    assert not [line for line in compiled.as_text().splitlines() if "= f32[90,2,8,6]" in line and " copy(" in line]
