"""Reference of paged attention in plain JAX: online softmax over pages, never a copy of a whole context.

Two regimes over the same batch. *Prefill* tiles hold many rows of one sequence: matrix products per group of pages.
*Decode* rows have one query each: they are processed `ROW_CHUNK` at a time, longest contexts first, so that a chunk's
trip count wastes little on its shorter contexts.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels.kv_format import LayerPool, ScaledPages, decode, pages_of, token_rows
from pallas_kernels.lora.layout import ceil_div
from pallas_kernels.paged_attention.plan import AttentionShape
from pallas_kernels.paged_attention.tiles import AttentionTiles

ROW_CHUNK = 16
"""Decode rows per gather of pages."""

PREFILL_TOKENS = 128
"""Keys read at once in the prefill regime."""

LANES = 32
"""Columns of a head summed side by side in the decode regime, to fill a CPU's vector units."""

MASKED = -1e30
"""Score of a key that a query must not see; finite, so that a fully masked block leaves no NaN."""


@dataclass(frozen=True)
class Attention:
    """The reference as an implementation of `PagedAttention`. tile_rows: most rows of a prefill tile."""

    tiles: AttentionTiles
    shape: AttentionShape
    tile_rows: int

    def __call__(self, q: jax.Array, pool: LayerPool) -> jax.Array:
        return paged_attention(q, pool, self.tiles, self.shape, self.tile_rows)


def paged_attention(
    q: jax.Array, pool: LayerPool, tiles: AttentionTiles, shape: AttentionShape, tile_rows: int
) -> jax.Array:
    """See `pallas_kernels.paged_attention.api.PagedAttention`."""
    num_tokens, num_heads, head_dim = q.shape
    dtype = q.dtype
    page_size, num_kv_heads, group, window = shape.page_size, shape.num_kv_heads, shape.group, shape.window
    q = (q.astype(jnp.float32) * head_dim**-0.5).reshape(num_tokens, num_kv_heads, group, head_dim)
    exact = lax.Precision.HIGHEST if shape.dtype == jnp.float32 else None
    rows = token_rows(pages_of(pool))
    cap = shape.score_cap

    def capped(scores: jax.Array) -> jax.Array:
        return scores if cap is None else cap * jnp.tanh(scores / cap)

    def pages(ids: jax.Array, tile: int) -> jax.Array:
        """Keys (tile 0) or values (tile 1) of pages, without their scales: `[..., page_size, Hkv, head_dim]`."""
        found = decode(rows.at[ids, tile].get(mode="clip"), shape.kv_dtype, shape.dtype)
        return found.reshape(*ids.shape, page_size, num_kv_heads, head_dim)

    def scaled(x: jax.Array, ids: jax.Array, tile: int, seen: jax.Array, order: Callable[..., jax.Array]) -> jax.Array:
        """Scores times the scales of keys (tile 0), or weights times those of values (tile 1), 0 if not `seen`.
        order: from `[..., page_size, Hkv]` to a shape that broadcasts to x's."""
        if not isinstance(pool, ScaledPages):
            return x
        found = pool.scales.at[ids, tile].get(mode="clip").astype(jnp.float32)
        return x * order(jnp.where(seen[..., None], found, 0))  # a previous owner may have left NaN

    def initial(*shape: int) -> tuple[jax.Array, ...]:
        """Highest score, sum of weights, weighted sum of values, before the first key."""
        return jnp.full(shape, MASKED), jnp.zeros(shape), jnp.zeros((*shape, head_dim))

    def prefill_tile(i: jax.Array, out: jax.Array) -> jax.Array:
        seq, row = tiles.prefill_seq[i], tiles.prefill_row[i]
        first_row = tiles.first_row[seq] + row
        start = jnp.clip(first_row, 0, num_tokens - tile_rows)
        q_rows = lax.dynamic_slice_in_dim(q, start, tile_rows).astype(shape.dtype)  # [M, Hkv, G, hd]
        own = (jnp.arange(tile_rows) + start >= first_row) & (
            jnp.arange(tile_rows) + start < tiles.first_row[seq] + tiles.length[seq]
        )
        position = tiles.context[seq] + start + jnp.arange(tile_rows) - tiles.first_row[seq]  # [M]
        last = tiles.context[seq] + jnp.minimum(row + tile_rows, tiles.length[seq])
        begin = 0 if window is None else jnp.maximum(tiles.context[seq] + row - window + 1, 0)
        count = min(ceil_div(PREFILL_TOKENS, page_size), tiles.page_table.shape[1])
        # A page table whose width is no multiple of `count` is read with clamped indices past its end, masked below.
        columns = jnp.arange(count)

        def body(block: jax.Array, state: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
            highest, total, acc = state
            ids = tiles.page_table.at[seq, block * count + columns].get(mode="clip")
            k = pages(ids, 0).reshape(count * page_size, num_kv_heads, head_dim)
            v = pages(ids, 1).reshape(count * page_size, num_kv_heads, head_dim)
            scores = jnp.einsum("mngd,tnd->ngmt", q_rows, k, precision=exact, preferred_element_type=jnp.float32)
            key = block * count * page_size + jnp.arange(count * page_size)
            read = (key >= begin) & (key < last)
            scales = read.reshape(count, page_size), lambda s: s.reshape(-1, num_kv_heads).T[:, None, None]
            scores = capped(scaled(scores, ids, 0, *scales))
            seen = key[None, :] <= position[:, None]
            if window is not None:
                seen &= key[None, :] > position[:, None] - window
            scores = jnp.where(seen, scores, MASKED)
            v = jnp.where(read[:, None, None], v, 0)  # a previous owner may have left NaN
            new = jnp.maximum(highest, scores.max(-1))
            decay, p = jnp.exp(highest - new), jnp.exp(scores - new[..., None])
            weights = scaled(p, ids, 1, *scales).astype(shape.dtype)
            pv = jnp.einsum("ngmt,tnd->ngmd", weights, v, precision=exact, preferred_element_type=jnp.float32)
            return new, total * decay + p.sum(-1), acc * decay[..., None] + pv

        state = initial(num_kv_heads, group, tile_rows)
        _, total, acc = lax.fori_loop(begin // (count * page_size), ceil_div(last, count * page_size), body, state)
        result = (acc / total[..., None]).transpose(2, 0, 1, 3)  # [M, Hkv, G, hd]
        old = lax.dynamic_slice_in_dim(out, start, tile_rows)
        return lax.dynamic_update_slice_in_dim(out, jnp.where(own[:, None, None, None], result, old), start, 0)

    chunk = min(ROW_CHUNK, tiles.decode_seq.shape[0])
    lanes = LANES if head_dim % LANES == 0 else head_dim

    def decode_chunk(i: jax.Array, out: jax.Array) -> jax.Array:
        start = jnp.clip(i * chunk, 0, tiles.decode_seq.shape[0] - chunk)
        seq = lax.dynamic_slice(tiles.decode_seq, (start,), (chunk,))
        entry = start + jnp.arange(chunk)
        live = (entry >= i * chunk) & (entry < tiles.num_decode)
        row = jnp.where(live, tiles.first_row[seq], num_tokens)
        q_rows = q.at[row].get(mode="clip")[:, None]  # [M, 1, Hkv, G, hd]
        tokens = jnp.where(live, tiles.context[seq] + 1, 0)
        begin = jnp.zeros_like(tokens) if window is None else jnp.maximum(tokens - window, 0)
        first = begin // page_size  # [M]: pages before it are skipped
        table = tiles.page_table.at[seq].get(mode="clip")  # [M, max_pages]

        def masked_value(ids: jax.Array, seen: jax.Array, j: int) -> jax.Array:
            """Token j of each page, `[M, Hkv, hd]`: a separate gather, which XLA fuses into its use on a CPU."""
            v = decode(rows.at[ids, 1, j].get(mode="clip"), shape.kv_dtype, shape.dtype)
            return jnp.where(seen[:, j, None, None], v.reshape(chunk, num_kv_heads, head_dim), 0)

        def body(block: jax.Array, state: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
            highest, total, acc = state
            column = first + block
            ids = jnp.take_along_axis(table, column[:, None], axis=1, mode="clip")[:, 0]
            k = pages(ids, 0)[:, :, :, None]  # [M, page_size, Hkv, 1, hd]
            partial = sum(q_rows[..., d : d + lanes] * k[..., d : d + lanes] for d in range(0, head_dim, lanes))
            key = column[:, None] * page_size + jnp.arange(page_size)  # [M, page_size]
            seen = (key >= begin[:, None]) & (key < tokens[:, None])
            scores = lax.optimization_barrier(partial).sum(-1)  # [M, page_size, Hkv, G]
            scores = capped(scaled(scores, ids, 0, seen, lambda s: s[..., None]))
            scores = jnp.where(seen[..., None, None], scores, MASKED)
            new = jnp.maximum(highest, scores.max(1))
            decay, p = jnp.exp(highest - new), jnp.exp(scores - new[:, None])
            # Computed once, not once per column of the values.
            weights = lax.optimization_barrier(scaled(p, ids, 1, seen, lambda s: s[..., None]))
            # An unseen value may be NaN, and 0 * NaN is NaN.
            if group == 1:
                v = [masked_value(ids, seen, j) for j in range(page_size)]
            else:  # the group reads a value several times: one copy of the page is faster
                v = list(jnp.unstack(jnp.where(seen[..., None, None], pages(ids, 1), 0), axis=1))
            pv = sum(weights[:, j, :, :, None] * v[j][:, :, None] for j in range(page_size))
            return new, total * decay + p.sum(1), acc * decay[..., None] + pv

        state = initial(chunk, num_kv_heads, group)
        _, total, acc = lax.fori_loop(0, jnp.max(ceil_div(tokens, page_size) - first), body, state)
        return out.at[row].set(acc / total[..., None], mode="drop")

    out = jnp.zeros(q.shape, jnp.float32)
    if not shape.decode:
        out = lax.fori_loop(0, tiles.num_prefill, prefill_tile, out)
    out = lax.fori_loop(0, ceil_div(tiles.num_decode, chunk), decode_chunk, out)
    return out.reshape(num_tokens, num_heads, head_dim).astype(dtype)
