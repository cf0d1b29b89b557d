"""The sharded vocabulary: embedding, greedy token and logits. Called inside `shard_map`."""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax

from slora_jax.parallel.mesh import AXIS


def embed(lookup: Callable[[jax.Array], jax.Array], tokens: jax.Array, size: int) -> jax.Array:
    """Returns embeddings `[T, d]`, summed over the shards. Tokens outside the vocabulary (padding) give zeros.

    Args:
      lookup: maps rows of the shard's embedding, int `[T]`, to `[T, d]`.
      tokens: token ids `[T]`.
      size: vocabulary rows per shard.
    """
    row = tokens - lax.axis_index(AXIS) * size
    is_own = (row >= 0) & (row < size)
    own = jnp.where(is_own[:, None], lookup(row), 0)
    with jax.named_scope("all_reduce_embedding"):
        return lax.psum(own, AXIS)


def greedy(logits: jax.Array, vocab_size: int) -> jax.Array:
    """Returns the most likely token of each row, int32 `[S]`, as `sampling.greedy` does on one device.

    Ties go to the first token; a maximum that is not finite gives -1. The shards exchange 8 bytes per row: their
    maximum and its token.

    Args:
      logits: the shard's part, float32 `[S, V]`.
      vocab_size: size of the whole vocabulary.
    """
    size = logits.shape[1]
    first = lax.axis_index(AXIS) * size
    logits = jnp.where(first + jnp.arange(size) < vocab_size, logits, -jnp.inf)  # mask the padding of the last shards
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
    """Gathers the whole logits `[S, vocab_size]` from each shard's part `[S, V]`."""
    with jax.named_scope("all_gather_logits"):
        return lax.all_gather(logits, AXIS, axis=1, tiled=True)[:, :vocab_size]
