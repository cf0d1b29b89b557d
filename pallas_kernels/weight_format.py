"""Quantised kernels of experts: codes of one byte or half a byte, and scales.

The value is `code * scale`. Codes are int8, float8_e4m3fn or int4. A scale is of one output and a group of neighbouring
inputs, or of all inputs.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import numpy as np


class ScaledKernels(NamedTuple):
    """Kernels of experts: `codes` `[E, d_in, d_out]`, and `scale` float32 `[E, groups, d_out]`."""

    codes: jax.Array
    scale: jax.Array


Kernels = jax.Array | ScaledKernels


def codes_of(kernels: Kernels) -> jax.Array:
    """The array `[E, d_in, d_out]`, without scales."""
    return kernels.codes if isinstance(kernels, ScaledKernels) else kernels


def dequantised(codes: jax.Array, scale: jax.Array, dtype: np.dtype) -> jax.Array:
    """Returns the kernel `[d_in, d_out]` of `codes` `[d_in, d_out]` and `scale` `[groups, d_out]` in `dtype`."""
    groups, d_out = scale.shape
    wide = codes.reshape(groups, -1, d_out).astype(dtype)
    return (wide * scale.astype(dtype)[:, None]).reshape(codes.shape)
