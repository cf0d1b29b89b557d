"""Writes into one layer's pool `[num_pages, 2, page_size, W]`: pure functions that XLA compiles to in-place scatters if
the pool is donated. `tests/engine/test_no_pool_copy.py` checks that the compiled program has no copy."""

import jax
import jax.numpy as jnp


def write_kv(pool: jax.Array, k: jax.Array, v: jax.Array, page: jax.Array, offset: jax.Array) -> jax.Array:
    """Writes each token's key and value rows `[T, W]` to row `offset [T]` of page `page [T]` (int32).

    Padding tokens write to page 0, the dummy page, which is never read unmasked.
    """
    kv = jnp.stack([k, v], axis=1).astype(pool.dtype)  # one scatter: one launch
    return pool.at[page[:, None], jnp.arange(2), offset[:, None]].set(kv, mode="drop")


def write_pages(pool: jax.Array, page: jax.Array, contents: jax.Array) -> jax.Array:
    """Writes whole pages `contents [K, 2, page_size, W]` to `page [K]` (int32); ids past the pool's end are dropped."""
    return pool.at[page].set(contents.astype(pool.dtype), mode="drop")
