"""Writes into the pool change the named rows in place, and nothing else."""

import re

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pallas_kernels.kv_format import ScaledPages, decode, token_rows, weights_at
from pallas_kernels.pool_write import NO_PAGE, write_kv, write_pages
from pallas_kernels.targets import TARGETS
from slora_jax.analysis import launches
from slora_jax.analysis.compiled import compile_with_ptx

PAGES, PAGE_SIZE, WIDTH, TOKENS, MANY = 11, 8, 24, 13, 4
DTYPES = pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
SEEDS = st.integers(0, 2**32 - 1)

kv_in_place = jax.jit(write_kv, donate_argnums=0)
pages_in_place = jax.jit(write_pages, donate_argnums=0)


@pytest.mark.parametrize("kind", ["fp8", "int8"])
def test_a_narrow_pool_holds_rounded_tokens_beside_adapter_weights(kind, rng):
    """Values that fp8 cannot hold saturate; int8 scales each head alone; zeros stay zeros; other bits stay."""
    heads, page = 3, np.int32([2, 2, 5, NO_PAGE])
    before = rng.integers(0, 2**16, (PAGES, 2, PAGE_SIZE // 2, WIDTH)).astype(np.uint16)
    pool = jnp.array(before)
    if kind == "int8":
        pool = ScaledPages(pool, jnp.ones((PAGES, 2, PAGE_SIZE, heads), jnp.bfloat16))
    kv = rng.standard_normal((2, 4, heads, WIDTH // heads)).astype(np.float32)
    kv[0, 0, 0], kv[1, 0, 1, :2], kv[0, 2, 1] = 0, (1000, -1e6), 1e-3 * kv[0, 2, 1]
    weights = rng.standard_normal((1, 2, PAGE_SIZE // 2, WIDTH)).astype(ml_dtypes.bfloat16)

    pool = kv_in_place(pool, *kv.reshape(2, 4, WIDTH), page, np.int32([1, 7, 0, 0]))
    pool = pages_in_place(pool, np.int32([7]), jnp.array(weights))

    pages, scales = pool if kind == "int8" else (pool, None)
    found = decode(token_rows(pages), kind, jnp.float32)[page[:3], :, np.array([1, 7, 0])]  # [T, 2, W]
    found = np.asarray(found).reshape(3, 2, *kv.shape[2:]).swapaxes(0, 1)
    if kind == "int8":
        scale = np.asarray(scales, np.float32)[page[:3], :, np.array([1, 7, 0])].swapaxes(0, 1)[..., None]
        assert (abs(found * scale - kv[:, :3]) <= 0.51 * scale).all()
        assert (scale <= 1.01 * abs(kv[:, :3]).max(-1, keepdims=True) / 127 + 2.0**-99).all()
    else:
        kv = np.clip(kv, -448, 448)
        assert (abs(found - kv[:, :3]) <= 2.0**-4 * abs(kv[:, :3]) + 2.0**-10).all()
    stored = weights_at(pages.reshape(-1, WIDTH), np.arange(7 * PAGE_SIZE, 8 * PAGE_SIZE))
    assert_same_bits(stored.reshape(weights.shape), weights)
    rows = np.asarray(token_rows(pages)).copy()
    old = np.asarray(token_rows(jnp.array(before)))
    rows[page[:3], :, [1, 7, 0]] = old[page[:3], :, [1, 7, 0]]
    rows[7] = old[7]
    np.testing.assert_array_equal(rows, old)


def random_pool(rng: np.random.Generator, dtype: str) -> np.ndarray:
    return rng.standard_normal((PAGES, 2, PAGE_SIZE, WIDTH)).astype(
        ml_dtypes.bfloat16 if dtype == "bfloat16" else dtype
    )


def assert_same_bits(found: jax.Array, expected: np.ndarray) -> None:
    assert found.dtype == expected.dtype
    np.testing.assert_array_equal(np.asarray(found).view(np.uint8), expected.view(np.uint8))


@DTYPES
@settings(max_examples=20)
@given(seed=SEEDS, padding=st.integers(0, TOKENS), outside=st.integers(0, 3))
def test_each_token_is_written_to_its_page_and_offset(dtype, seed, padding, outside):
    """Padding tokens and ids past the end are dropped; float32 rows are rounded to the pool."""
    rng = np.random.default_rng(seed)
    pool = random_pool(rng, dtype)
    k, v = rng.standard_normal((2, TOKENS, WIDTH), np.float32)
    places = rng.choice((PAGES - 1) * PAGE_SIZE, TOKENS, replace=False)
    page, offset = 1 + places // PAGE_SIZE, places % PAGE_SIZE
    page[TOKENS - padding :], offset[TOKENS - padding :] = NO_PAGE, 0
    page[:outside] = PAGES + rng.integers(0, 3, outside)

    expected = pool.copy()
    for token in range(TOKENS):
        if page[token] < PAGES:
            expected[page[token], 0, offset[token]] = k[token].astype(pool.dtype)
            expected[page[token], 1, offset[token]] = v[token].astype(pool.dtype)
    assert_same_bits(kv_in_place(jnp.array(pool), k, v, page.astype(np.int32), offset.astype(np.int32)), expected)


@DTYPES
@settings(max_examples=20)
@given(seed=SEEDS, outside=st.integers(0, MANY))
def test_whole_pages_are_written_and_ids_past_the_end_are_dropped(dtype, seed, outside):
    rng = np.random.default_rng(seed)
    pool = random_pool(rng, dtype)
    contents = rng.standard_normal((MANY, *pool.shape[1:]), np.float32)
    page = 1 + rng.permutation(PAGES - 1)[:MANY]
    page[MANY - outside :] = PAGES  # the padding of an upload
    expected = pool.copy()
    expected[page[: MANY - outside]] = contents[: MANY - outside].astype(pool.dtype)
    assert_same_bits(pages_in_place(jnp.array(pool), page.astype(np.int32), contents), expected)


@DTYPES
@pytest.mark.parametrize("op", ["write_kv", "write_pages"])
def test_a_donated_pool_is_updated_in_place(op, dtype):
    """A pool far larger than what is written: a copy would be seen in the program's text and in its buffers."""
    pool = jax.ShapeDtypeStruct((64, 2, PAGE_SIZE, WIDTH), jnp.dtype(dtype))
    rows, ids = jax.ShapeDtypeStruct((TOKENS, WIDTH), pool.dtype), jax.ShapeDtypeStruct((TOKENS,), jnp.int32)
    if op == "write_kv":
        lowered = kv_in_place.lower(pool, rows, rows, ids, ids)
    else:
        contents = jax.ShapeDtypeStruct((MANY, *pool.shape[1:]), pool.dtype)
        lowered = pages_in_place.lower(pool, jax.ShapeDtypeStruct((MANY,), jnp.int32), contents)
    compiled = lowered.compile()

    nbytes = int(np.prod(pool.shape)) * pool.dtype.itemsize
    memory = compiled.memory_analysis()
    assert memory.alias_size_in_bytes == memory.output_size_in_bytes == nbytes
    assert memory.temp_size_in_bytes < nbytes / 4
    element = {"float32": "f32", "bfloat16": "bf16"}[dtype]
    shape = rf"{element}\[{','.join(map(str, pool.shape))}\]"
    copies = [line for line in compiled.as_text().splitlines() if re.search(rf"= {shape}\S* copy(-start)?\(", line)]
    assert not copies
    assert re.search(rf"{shape}.*parameter\(0\)", compiled.as_text())  # the expression does match the pool


@DTYPES
def test_the_donated_buffer_is_the_result(dtype):
    rng = np.random.default_rng(0)
    pool = jnp.array(random_pool(rng, dtype))
    address = pool.unsafe_buffer_pointer()
    rows, ids = np.zeros((TOKENS, WIDTH), np.float32), np.arange(TOKENS, dtype=np.int32) % PAGES
    result = kv_in_place(pool, rows, rows, ids, np.zeros(TOKENS, np.int32))
    assert pool.is_deleted() and result.unsafe_buffer_pointer() == address


GPU_PAGES, GPU_WIDTH, GPU_TOKENS = 140_000, 1024, 64


@pytest.mark.parametrize("op", ["write_kv", "write_pages"])
def test_a_gpu_writes_with_plain_stores_and_64_bit_addresses(op):
    """A pool of more than 2^32 elements, for which 32-bit addresses would not do."""
    pool = jax.ShapeDtypeStruct((GPU_PAGES, 2, 16, GPU_WIDTH), jnp.bfloat16)
    ids = jax.ShapeDtypeStruct((GPU_TOKENS,), jnp.int32)
    if op == "write_kv":
        rows = jax.ShapeDtypeStruct((GPU_TOKENS, GPU_WIDTH), pool.dtype)
        write, arguments = kv_in_place, (rows, rows, ids, ids)
    else:
        write, arguments = pages_in_place, (ids, jax.ShapeDtypeStruct((GPU_TOKENS, *pool.shape[1:]), pool.dtype))
    compiled, ptx = compile_with_ptx(TARGETS["h200"], write, pool, *arguments)
    assert launches(compiled.as_text()) == 1
    assert compiled.memory_analysis().alias_size_in_bytes == 2 * int(np.prod(pool.shape))
    assert compiled.memory_analysis().temp_size_in_bytes == 0
    assert "st.global" in ptx
    assert "atom" not in ptx
    page_bytes = 2 * int(np.prod(pool.shape[1:]))
    assert re.search(rf"mul\.wide\.u32\s+%rd\d+, %r\d+, {page_bytes};|shl\.b64\s.*, 16;", ptx)
