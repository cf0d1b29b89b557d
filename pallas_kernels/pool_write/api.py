"""Writes into one layer's pool `[num_pages, 2, page_size, W]`: pure functions that XLA compiles to in-place scatters if
the pool is donated, and to plain stores, because no place is written twice."""

import jax
import jax.numpy as jnp
import numpy as np

NO_PAGE = np.int32(2**31 - 1)
"""Page id past the end of every pool: what is written to it is dropped."""


def write_kv(pool: jax.Array, k: jax.Array, v: jax.Array, page: jax.Array, offset: jax.Array) -> jax.Array:
    """Writes each token's key and value rows `[T, W]` to row `offset [T]` of page `page [T]` (int32).

    Page ids past the pool's end are dropped. The other places must be distinct: of two rows for the same place, parts
    of either may remain.
    """
    kv = jnp.stack([k, v], axis=1).astype(pool.dtype)  # one scatter: one launch
    return pool.at[page[:, None], jnp.arange(2), offset[:, None]].set(kv, mode="drop", unique_indices=True)


def write_pages(pool: jax.Array, page: jax.Array, contents: jax.Array) -> jax.Array:
    """Writes whole pages `contents [K, 2, page_size, W]` to `page [K]` (int32).

    Page ids past the pool's end are dropped. The others must be distinct, as in `write_kv`.
    """
    return pool.at[page].set(contents.astype(pool.dtype), mode="drop", unique_indices=True)
