"""Keys and values of one byte an element in the unified pool, beside adapter weights of 16 bits.

A layer's array is then uint16 `[num_pages, 2, page_size / 2, W]`. A page holds the keys and values of `page_size`
tokens as bytes `[2, page_size, W]`, or two tiles `[page_size / 2, W]` of bfloat16 adapter weights: the same bytes. The
array is not of bfloat16, because XLA may move floats through float32, which changes the bits of a NaN.

- "fp8": float8_e4m3fn without a scale. Values beyond its range (448) saturate.
- "int8": one scale for each token and KV head. A page fills token by token, so a scale for a whole page would have to
  change what is written already. The scales are a second array of the layer, bfloat16 `[num_pages, 2, page_size, Hkv]`.
"""

from __future__ import annotations

from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

KvDtype = Literal["fp8", "int8"]

FP8 = jnp.float8_e4m3fn
FP8_LARGEST = 448.0
INT8_LARGEST = 127.0
LEAST_SCALE = 2.0**-100
"""Scale of a head whose values are all 0."""


class ScaledPages(NamedTuple):
    """A layer's pool with int8 keys and values: `pages` uint16, and the scales beside them."""

    pages: jax.Array
    scales: jax.Array


LayerPool = jax.Array | ScaledPages
"""One layer's pool. uint16 stands for fp8 keys and values; any other dtype is that of keys, values and weights."""


def pages_of(pool: LayerPool) -> jax.Array:
    """The array of a layer's pages, without scales."""
    return pool.pages if isinstance(pool, ScaledPages) else pool


def kv_dtype_of(pool: LayerPool) -> KvDtype | None:
    """The format of keys and values; None if they have the dtype of the array."""
    if isinstance(pool, ScaledPages):
        return "int8"
    return "fp8" if pool.dtype == jnp.uint16 else None


def page_tokens(pages: jax.Array) -> int:
    """Tokens of a page."""
    return pages.shape[2] * (2 if pages.dtype == jnp.uint16 else 1)


def token_rows(pages: jax.Array) -> jax.Array:
    """The pages with a row per token: `[num_pages, 2, page_size, W]`, or `W / 2` pairs of bytes (uint16)."""
    return pages.reshape(*pages.shape[:2], page_tokens(pages), -1)


def encode(kv: jax.Array, pool: LayerPool) -> tuple[jax.Array, jax.Array | None]:
    """Converts keys or values `[..., W]` to rows of `token_rows`, and for int8 also returns scales `[..., Hkv]`."""
    kind, scales = kv_dtype_of(pool), None
    if kind is None:
        return kv.astype(pages_of(pool).dtype), None
    if isinstance(pool, ScaledPages):
        heads = kv.astype(jnp.float32).reshape(*kv.shape[:-1], pool.scales.shape[-1], -1)
        scales = jnp.maximum(jnp.abs(heads).max(-1) / INT8_LARGEST, LEAST_SCALE).astype(pool.scales.dtype)
        heads = jnp.round(heads / scales.astype(jnp.float32)[..., None])  # by the rounded scale, which readers have
        narrow = jnp.clip(heads, -INT8_LARGEST, INT8_LARGEST).astype(jnp.int8).reshape(kv.shape)
    else:
        narrow = jnp.clip(kv, -FP8_LARGEST, FP8_LARGEST).astype(FP8)
    pairs = lax.bitcast_convert_type(narrow, jnp.uint8).reshape(*kv.shape[:-1], -1, 2)
    return lax.bitcast_convert_type(pairs, jnp.uint16), scales


def decode(rows: jax.Array, kind: KvDtype | None, dtype: Any) -> jax.Array:
    """Converts rows of `token_rows` to `dtype`: `[..., W]`, without the scales."""
    if kind is None:
        return rows
    narrow = lax.bitcast_convert_type(rows, FP8 if kind == "fp8" else jnp.int8)
    return narrow.reshape(*rows.shape[:-1], -1).astype(dtype)


def weights_at(flat: jax.Array, *row: Any, **mode: Any) -> jax.Array:
    """Gathers adapter weights: `flat.at[row].get(**mode)` of pages as rows `[rows, W]`; bits (uint16) as bfloat16."""
    found = flat.at[row].get(**mode)
    return lax.bitcast_convert_type(found, jnp.bfloat16) if flat.dtype == jnp.uint16 else found
