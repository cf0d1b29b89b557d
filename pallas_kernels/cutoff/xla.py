"""The XLA reference of the search for top-k's and top-p's threshold."""

from __future__ import annotations

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax import lax

INFINITY = 0x7F800000
"""Bit pattern of float32 infinity."""

SEARCH_BITS = 2
"""Bits of the threshold that each pass finds; on a CPU, one or four take longer."""


def cutoff(logits: jax.Array, best: jax.Array, temperature: jax.Array, top_k: jax.Array, top_p: jax.Array) -> jax.Array:
    """See `api.cutoff`."""
    distance = jnp.take_along_axis(logits, best[:, None], axis=1) - logits
    bits = lax.bitcast_convert_type(distance, jnp.uint32)  # increases with the distance, which is not negative
    count = jnp.minimum(top_k, logits.shape[1])
    by_top_k = _first_reaching(bits, jnp.ones_like(bits, jnp.int32), count)
    last = jnp.where(top_k > 0, by_top_k, INFINITY).astype(jnp.uint32)
    p = jnp.exp(-distance / jnp.where(temperature > 0, temperature, 1.0)[:, None])
    p = jnp.where(bits <= last[:, None], p, 0.0)
    by_top_p = _first_reaching(bits, p, top_p * p.sum(axis=1))
    last = jnp.where(top_p < 1.0, jnp.minimum(last, by_top_p), last)
    return lax.bitcast_convert_type(last, jnp.float32)


def _first_reaching(bits: jax.Array, weight: jax.Array, enough: jax.Array) -> jax.Array:
    """Returns the smallest t `[S]` for which the tokens with `bits <= t` weigh `enough` `[S]`, exact to the last bit;
    infinity's pattern if none is. bits, weight: `[S, V]`."""

    def narrow(i: jax.Array, found: jax.Array) -> jax.Array:
        shift = (32 - SEARCH_BITS * (i + 1)).astype(jnp.uint32)
        limits = [found + (jnp.uint32(digit + 1) << shift) - 1 for digit in range(2**SEARCH_BITS - 1)]
        digit = sum((total < enough).astype(jnp.uint32) for total in _totals(bits, weight, limits))
        return found + (digit << shift)

    found = lax.fori_loop(0, 32 // SEARCH_BITS, narrow, jnp.zeros(bits.shape[0], jnp.uint32))
    return jnp.minimum(found, jnp.uint32(INFINITY))


def _totals(bits: jax.Array, weight: jax.Array, limits: Sequence[jax.Array]) -> Sequence[jax.Array]:
    """Returns the weight of the tokens with `bits <= limit`, for each limit `[S]`, in one pass over the rows."""
    kept = tuple(jnp.where(bits <= limit[:, None], weight, 0) for limit in limits)
    zeros = (jnp.zeros((), weight.dtype),) * len(kept)
    return lax.reduce(kept, zeros, lambda a, b: tuple(x + y for x, y in zip(a, b, strict=True)), (1,))
