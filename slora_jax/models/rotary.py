"""Rotary position embedding in the half-rotation convention of Hugging Face checkpoints."""

import math

import jax
import jax.numpy as jnp
import numpy as np

from slora_jax.models.traits import RopeConfig

Table = tuple[jax.Array, jax.Array]
"""Cosines and sines of one rotary embedding, float32 `[T, 1, pairs]` each."""


def inverse_frequencies(rope: RopeConfig, head_dim: int, max_positions: int = 0) -> np.ndarray:
    """Radians per token of each rotated pair, float32 `[pairs]`, with the config's scaling applied.

    Follows transformers' float32 arithmetic step by step, because at long positions rounding affects the logits.

    Args:
      max_positions: the longest sequence, on which "longrope" depends.
    """
    width = rope.rotated(head_dim)
    exponents = np.arange(0, width, 2, dtype=np.float32) / np.float32(width)
    frequencies: np.ndarray = np.float32(1.0) / np.float32(rope.theta) ** exponents
    is_long = rope.kind == "longrope" and max_positions > rope.original_max_position_embeddings
    if divisors := rope.long_divisors if is_long else rope.divisors:
        frequencies = frequencies / np.asarray(divisors, np.float32)
    if rope.kind == "linear":
        return frequencies / np.float32(rope.factor)
    if rope.kind == "yarn":
        kept = 1 - _ramp(rope, width)
        return frequencies / np.float32(rope.factor) * (1 - kept) + frequencies * kept
    if rope.kind == "llama3":
        context = np.float32(rope.original_max_position_embeddings)
        low, high = np.float32(rope.low_freq_factor), np.float32(rope.high_freq_factor)
        turns = context / (np.float32(2 * np.pi) / frequencies)  # full turns within the original context
        smooth = np.clip((turns - low) / (high - low), 0.0, 1.0)  # 0: divided by factor, 1: unchanged
        return (1 - smooth) * frequencies / np.float32(rope.factor) + smooth * frequencies
    return frequencies  # "dynamic" scales only sequences that are longer than the model's positions


def _ramp(rope: RopeConfig, width: int) -> np.ndarray:
    """YaRN's share of interpolation of each pair, float32 `[width / 2]`."""

    def pair_of(turns: float) -> float:
        """The pair that makes this number of full turns within the original context."""
        return (
            width * math.log(rope.original_max_position_embeddings / (turns * 2 * math.pi)) / (2 * math.log(rope.theta))
        )

    low, high = pair_of(rope.beta_fast), pair_of(rope.beta_slow)
    if rope.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, width - 1)
    return np.clip((np.arange(width // 2, dtype=np.float32) - low) / ((high - low) or 0.001), 0, 1).astype(np.float32)


def rotary_tables(positions: jax.Array, frequencies: np.ndarray, factor: float = 1.0) -> Table:
    """Returns cosines and sines, times `factor`, of int32 `positions` `[T]`."""
    angles = positions.astype(jnp.float32)[:, None] * frequencies  # [T, pairs]; elementwise, so never TF32
    cos, sin = jnp.cos(angles)[:, None, :], jnp.sin(angles)[:, None, :]
    return (cos, sin) if factor == 1.0 else (cos * factor, sin * factor)


def rotate(x: jax.Array, table: Table, interleaved: bool = False, scale: float = 1.0) -> jax.Array:
    """Rotates the first `2 * pairs` components of each head of `x` `[T, heads, head_dim]`, in float32.

    The pairs of components are i and `i + pairs`, or 2i and `2i + 1` if `interleaved`. The result has the first
    components of all pairs before the second ones in both cases: scores do not depend on this order, because queries
    and keys have the same one.

    Args:
      scale: factor of the result.

    Returns:
      `[T, heads, head_dim]` in `x`'s dtype.
    """
    cos, sin = table
    width = 2 * cos.shape[-1]
    wide = x.astype(jnp.float32)
    rotated, rest = wide[..., :width], wide[..., width:]
    if interleaved:
        first, second = rotated[..., 0::2], rotated[..., 1::2]
    else:
        first, second = jnp.split(rotated, 2, axis=-1)  # [T, heads, pairs] each
    parts = [first * cos - second * sin, second * cos + first * sin]
    if rest.shape[-1]:
        parts.append(rest)
    return scaled(jnp.concatenate(parts, axis=-1), scale).astype(x.dtype)


def scaled(x: jax.Array, factor: float) -> jax.Array:
    """Returns `x * factor`, computed in float32, in `x`'s dtype; adds no operation for a factor of one."""
    return x if factor == 1.0 else (x.astype(jnp.float32) * factor).astype(x.dtype)
