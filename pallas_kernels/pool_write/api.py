"""Writes into one layer's pool `[num_pages, 2, page_size, W]`: pure functions that XLA compiles to in-place scatters if
the pool is donated, and to plain stores, because no place is written twice."""

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.kv_format import LayerPool, ScaledPages, encode, pages_of, token_rows

NO_PAGE = np.int32(2**31 - 1)
"""Page id past the end of every pool: what is written to it is dropped."""


def write_kv(pool: LayerPool, k: jax.Array, v: jax.Array, page: jax.Array, offset: jax.Array) -> LayerPool:
    """Writes each token's key and value rows `[T, W]` to row `offset [T]` of page `page [T]` (int32).

    Page ids past the pool's end are dropped. The other places must be distinct: of two rows for the same place, parts
    of either may remain.
    """
    rows, scales = encode(jnp.stack([k, v], axis=1), pool)  # one scatter: one launch

    def written(array: jax.Array, new: jax.Array) -> jax.Array:
        return array.at[page[:, None], jnp.arange(2), offset[:, None]].set(new, mode="drop", unique_indices=True)

    pages = pages_of(pool)
    pages = written(token_rows(pages), rows).reshape(pages.shape)
    if not isinstance(pool, ScaledPages):
        return pages
    assert scales is not None
    return ScaledPages(pages, written(pool.scales, scales))


def write_pages(pool: LayerPool, page: jax.Array, contents: jax.Array) -> LayerPool:
    """Writes whole pages `contents [K, 2, page_size, W]` to `page [K]` (int32).

    Page ids past the pool's end are dropped. The others must be distinct, as in `write_kv`. A uint16 pool takes the
    bits of bfloat16 contents.
    """
    pages = pages_of(pool)
    if pages.dtype == jnp.uint16:
        contents = jax.lax.bitcast_convert_type(contents, jnp.uint16)
    pages = pages.at[page].set(contents.astype(pages.dtype), mode="drop", unique_indices=True)
    return pool._replace(pages=pages) if isinstance(pool, ScaledPages) else pages
