"""The vocabulary over shards: embedding, greedy token and logits. Called inside `shard_map`, on a shard's own part."""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax

from slora_jax.parallel.mesh import AXIS


def embed(lookup: Callable[[jax.Array], jax.Array], tokens: jax.Array, size: int) -> jax.Array:
    """Embeddings `[T, d]` of `tokens [T]`, where `lookup` has `size` tokens of each shard: its own rows, and zeros for
    the others', summed over the shards. A token that is nobody's (padding) is zero."""
    row = tokens - lax.axis_index(AXIS) * size
    is_own = (row >= 0) & (row < size)
    own = jnp.where(is_own[:, None], lookup(row), 0)
    with jax.named_scope("all_reduce_embedding"):
        return lax.psum(own, AXIS)


def greedy(logits: jax.Array, vocab_size: int) -> jax.Array:
    """The likeliest token of each row, int32 `[S]`, from a shard's `logits [S, V]` each: the shards exchange their
    largest values and where these are, 8 bytes a row. Of equal ones the first wins, and a value that is not finite
    gives -1, as on one device (`sampling.greedy`)."""
    size = logits.shape[1]
    first = lax.axis_index(AXIS) * size
    logits = jnp.where(first + jnp.arange(size) < vocab_size, logits, -jnp.inf)  # the last shards' rounding up
    best = jnp.argmax(logits, axis=-1)  # [S]
    value = jnp.take_along_axis(logits, best[:, None], axis=1)  # [S, 1]
    token = (first + best).astype(jnp.int32)[:, None]
    pair = jnp.concatenate([lax.bitcast_convert_type(value, jnp.int32), token], axis=1)  # [S, 2]
    with jax.named_scope("all_gather_greedy"):
        pairs = lax.all_gather(pair, AXIS)  # [N, S, 2]
    values = lax.bitcast_convert_type(pairs[..., 0], jnp.float32)  # [N, S]
    winner = jnp.argmax(values, axis=0)[None]  # [1, S]
    value, token = (jnp.take_along_axis(x, winner, axis=0)[0] for x in (values, pairs[..., 1]))
    return jnp.where(jnp.isfinite(value), token, -1)


def gather_logits(logits: jax.Array, vocab_size: int) -> jax.Array:
    """The whole logits `[S, vocab_size]`, from a shard's `[S, V]` each."""
    with jax.named_scope("all_gather_logits"):
        return lax.all_gather(logits, AXIS, axis=1, tiled=True)[:, :vocab_size]
