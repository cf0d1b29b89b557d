"""Pools full of random numbers: one array per layer, as a server has them, shared by all the cases of a model."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

_kept: dict[tuple[Any, ...], tuple[jax.Array, ...]] = {}


def random_pools(shape: tuple[int, ...], layers: int, seed: int) -> tuple[jax.Array, ...]:
    """bfloat16 N(0, 0.02^2) `shape`, one per layer. Random, since a chip may run faster on zeros. Kept until others are
    asked for: two sets need not fit."""
    key = (shape, layers, seed)
    if key not in _kept:
        release()
        _kept[key] = tuple(random_array(shape, seed + layer, scale=0.02) for layer in range(layers))
    return _kept[key]


def release() -> None:
    """Frees the pools that are kept."""
    _kept.clear()


def random_array(shape: tuple[int, ...], seed: int, scale: float = 1.0) -> jax.Array:
    """bfloat16 N(0, scale^2), made on the device."""
    return _normal(jax.random.key(seed), shape, scale)


def _draw(key: jax.Array, shape: tuple[int, ...], scale: float) -> jax.Array:
    return scale * jax.random.normal(key, shape, jnp.bfloat16)


_normal = jax.jit(_draw, static_argnums=(1, 2))


def random_pages(count: int, num_pages: int, rng: np.random.Generator) -> np.ndarray:
    """`count` page ids in random order, without the dummy page 0; none twice before all have been taken once."""
    rounds = [1 + rng.permutation(num_pages - 1) for _ in range(-(-count // (num_pages - 1)))]
    return np.concatenate(rounds)[:count].astype(np.int32) if rounds else np.zeros(0, np.int32)
