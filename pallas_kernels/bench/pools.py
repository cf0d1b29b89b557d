"""Random pools: one array per layer, as in a server, shared by all cases of a model."""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

_kept: dict[tuple, tuple[jax.Array, ...]] = {}


def random_pools(shape: tuple[int, ...], layers: int, seed: int) -> tuple[jax.Array, ...]:
    """One bfloat16 array N(0, 0.02^2) of `shape` per layer. Zeros would be faster on some chips."""
    key = (shape, layers, seed)
    if key not in _kept:
        _kept.clear()  # two sets may not fit
        _kept[key] = tuple(random_array(shape, seed + layer, scale=0.02) for layer in range(layers))
    return _kept[key]


def random_array(shape: tuple[int, ...], seed: int, scale: float = 1.0) -> jax.Array:
    """bfloat16 N(0, scale^2), made on the device."""
    return _normal(jax.random.key(seed), shape, scale)


@partial(jax.jit, static_argnums=(1, 2))
def _normal(key: jax.Array, shape: tuple[int, ...], scale: float) -> jax.Array:
    return scale * jax.random.normal(key, shape, jnp.bfloat16)


def random_pages(count: int, num_pages: int, rng: np.random.Generator) -> np.ndarray:
    """Returns `count` page ids in random order, without the dummy page 0. An id repeats only after all were used."""
    rounds = [1 + rng.permutation(num_pages - 1) for _ in range(-(-count // (num_pages - 1)))]
    return np.concatenate(rounds)[:count].astype(np.int32) if rounds else np.zeros(0, np.int32)
