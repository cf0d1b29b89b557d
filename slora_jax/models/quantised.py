"""Quantised kernels: how they are stored, rounded on the host, and multiplied.

A kernel `[d_in, d_out]` is stored as codes and a float32 scale `[groups, d_out]`; kernels of experts have a first axis
more. The value is `code * scale`:

    format    codes                                    groups
    "int8"    int8 [d_in, d_out], -127..127            1
    "fp8"     float8_e4m3fn [d_in, d_out]              1
    "int4"    int4 [d_in, d_out], -8..7                d_in / group_size(d_in)

XLA stores two int4 codes in a byte, on a CPU and on a GPU; on the host, NumPy takes a byte for each.
"""

from __future__ import annotations

import math
from typing import Any, get_args

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.weight_format import dequantised
from slora_jax.errors import UnsupportedModelError
from slora_jax.models.traits import INT4_GROUP, WeightFormat

WEIGHT_FORMATS: tuple[WeightFormat, ...] = get_args(WeightFormat)

INT4_OPTIONS = {"xla_gpu_experimental_enable_subchannel_dequantisation_fusion": True}
"""XLA's options for a GPU program with "int4" kernels. Without them, it writes out each kernel in the dtype of `x`."""

_LEAST_GROUP = 16
_CLIPS = (1.0, 0.9)
"""Shares of a group's largest magnitude that "int4" tries as the largest code; the one of least squared error wins."""

_CODES = {"int8": np.dtype(np.int8), "fp8": np.dtype(jnp.float8_e4m3fn), "int4": np.dtype(jnp.int4)}
_LARGEST = {"int8": 127.0, "fp8": 448.0}


def group_size(d_in: int) -> int:
    """Inputs that share a scale of "int4": the largest power of two up to 128 that divides `d_in`.

    Raises:
      UnsupportedModelError: it is below 16.
    """
    group = math.gcd(INT4_GROUP, d_in)
    if group < _LEAST_GROUP:
        raise UnsupportedModelError(
            f"weights='int4': a projection has {d_in} inputs on each device; the number must be a multiple of "
            f"{_LEAST_GROUP}, because groups of inputs share a scale; use 'int8' or 'fp8', or fewer devices"
        )
    return group


def num_groups(weights: WeightFormat, d_in: int) -> int:
    """Number of scales of one output."""
    return d_in // group_size(d_in) if weights == "int4" else 1


def zeros(weights: WeightFormat, d_in: int, d_out: int, *experts: int) -> tuple[jax.Array, jax.Array]:
    """Returns the codes and the scale of a kernel of zeros, or of the kernels of some number of `experts`."""
    groups = num_groups(weights, d_in)
    return jnp.zeros((*experts, d_in, d_out), _CODES[weights]), jnp.zeros((*experts, groups, d_out), jnp.float32)


def scale_path(path: tuple[Any, ...]) -> tuple[Any, ...]:
    """The path of the scale that belongs to the kernel at `path`, if that is quantised."""
    return *path[:-1], "scale" if path[-1] == "kernel" else f"{path[-1]}_scale"


def quantise(rows: np.ndarray, weights: WeightFormat) -> tuple[np.ndarray, np.ndarray]:
    """Rounds a kernel's columns to the nearest codes.

    Args:
      rows: float32 `[n, d_in]`, one row for each output.

    Returns:
      The codes `[n, d_in]`, and the scale float32 `[n, groups]`.
    """
    if weights == "int4":
        return _to_int4(rows)
    scale = np.abs(rows).max(1, keepdims=True) / np.float32(_LARGEST[weights])
    scale[scale == 0] = 1
    codes = rows / scale
    return (np.rint(codes, out=codes) if weights == "int8" else codes).astype(_CODES[weights]), scale


def _to_int4(rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    groups = rows.reshape(-1, group_size(rows.shape[1]))  # [n groups, group]
    high, low = groups.max(1, keepdims=True), groups.min(1, keepdims=True)
    extreme = np.where(high > -low, high, low)  # the largest in magnitude, with its sign
    extreme[extreme == 0] = 1
    codes, scale, least = np.empty_like(groups), np.empty_like(extreme), np.full(len(groups), np.inf, np.float32)
    for clip in _CLIPS:
        step = extreme * np.float32(clip / -8)  # -8 has no positive counterpart, so it is the extreme's code
        rounded = groups / step
        np.clip(np.rint(rounded, out=rounded), -8, 7, out=rounded)
        difference = rounded * step
        difference -= groups
        error = np.einsum("ij,ij->i", difference, difference)
        better = error < least
        for best, new in ((codes, rounded), (scale, step), (least[:, None], error[:, None])):
            np.copyto(best, new, where=better[:, None])
    return codes.astype(np.int8).astype(_CODES["int4"]).reshape(rows.shape), scale.reshape(len(rows), -1)


def num_bytes(leaf: Any) -> int:
    """Bytes of an array, or of a `jax.ShapeDtypeStruct`, on a device."""
    return math.prod(leaf.shape) * jnp.dtype(leaf.dtype).itemsize // (2 if leaf.dtype == jnp.int4 else 1)


def quantise_kernel(kernel: np.ndarray, weights: WeightFormat) -> dict[str, np.ndarray]:
    """Returns the codes "kernel" and the "scale" of a kernel `[d_in, d_out]`, or of experts' `[E, d_in, d_out]`."""
    rows = np.ascontiguousarray(np.asarray(kernel, np.float32).swapaxes(-1, -2))
    parts = zip(("kernel", "scale"), quantise(rows.reshape(-1, rows.shape[-1]), weights), strict=True)
    return {name: np.ascontiguousarray(part.reshape(*rows.shape[:-1], -1).swapaxes(-1, -2)) for name, part in parts}


def product(
    x: jax.Array, codes: jax.Array, scale: jax.Array, weights: WeightFormat, precision: jax.lax.Precision | None
) -> jax.Array:
    """Returns `x @ kernel` `[T, d_out]` in the dtype of `x` `[T, d_in]`, summed in float32."""
    if weights == "int4":  # XLA fuses this form with `INT4_OPTIONS`
        return jnp.dot(x, dequantised(codes, scale, x.dtype), precision=precision)
    # The scale comes after the product, so that XLA reads the codes themselves in it, without a copy in `x`'s dtype.
    y = jnp.dot(x, codes.astype(x.dtype), precision=precision, preferred_element_type=jnp.float32)
    return (y * scale[0]).astype(x.dtype)
