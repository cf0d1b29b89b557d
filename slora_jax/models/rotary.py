"""Rotary position embedding in the half-rotation convention of Hugging Face checkpoints."""

import jax
import jax.numpy as jnp
import numpy as np

from slora_jax.models.config import RopeConfig


def inverse_frequencies(rope: RopeConfig, head_dim: int) -> np.ndarray:
    """Radians per token of each rotated pair, float32 `[head_dim / 2]`, with the config's scaling applied.

    Follows transformers' float32 arithmetic step by step, because at long positions rounding affects the logits.
    """
    exponents = np.arange(0, head_dim, 2, dtype=np.float32) / np.float32(head_dim)
    frequencies: np.ndarray = np.float32(1.0) / np.float32(rope.theta) ** exponents
    if rope.divisors:
        frequencies = frequencies / np.asarray(rope.divisors, np.float32)
    if rope.kind == "linear":
        return frequencies / np.float32(rope.factor)
    if rope.kind == "llama3":
        context = np.float32(rope.original_max_position_embeddings)
        low, high = np.float32(rope.low_freq_factor), np.float32(rope.high_freq_factor)
        turns = context / (np.float32(2 * np.pi) / frequencies)  # full turns within the original context
        smooth = np.clip((turns - low) / (high - low), 0.0, 1.0)  # 0: divided by factor, 1: unchanged
        return (1 - smooth) * frequencies / np.float32(rope.factor) + smooth * frequencies
    return frequencies


def rotary_tables(positions: jax.Array, frequencies: np.ndarray) -> tuple[jax.Array, jax.Array]:
    """Returns cosines and sines, float32 `[T, 1, head_dim / 2]`, of int32 `positions` `[T]`."""
    angles = positions.astype(jnp.float32)[:, None] * frequencies  # [T, hd/2]; elementwise, so never TF32
    return jnp.cos(angles)[:, None, :], jnp.sin(angles)[:, None, :]


def rotate(x: jax.Array, cos: jax.Array, sin: jax.Array) -> jax.Array:
    """Rotates `x` `[T, heads, head_dim]` pairwise (component i with i + head_dim/2), in float32; keeps `x`'s dtype."""
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)  # [T, heads, hd/2] each
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1).astype(x.dtype)
