"""Parts of the kernel's online softmax: values in the tensor core's register layout."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

MASKED = -(2.0**100)
"""Score of a key that a query must not see; finite, so that a fully masked step leaves no NaN."""

LOG2_E = 1.4426950408889634

WGMMA = plgpu.Layout.WGMMA
PER_ROW = WGMMA.reduce(1)

COMPILER = plgpu.CompilerParams(approx_math=True)


def product(shape: Any, a: Any, b: Any) -> Any:
    """`a @ b` in float32 on the tensor core."""

    def multiply(acc: Any) -> Any:
        plgpu.wgmma(acc, a, b)
        return acc[...]

    return pl.run_scoped(multiply, plgpu.ACC(shape, jnp.float32))


def full(shape: tuple[int, ...], value: float, layout: Any) -> Any:
    """A float32 array filled with `value`."""
    return plgpu.layout_cast(jnp.full(shape, value, jnp.float32), layout)


def along(x: Any, axis: int, shape: tuple[int, ...]) -> Any:
    """Broadcasts a vector along `axis` of a matrix."""
    return lax.broadcast_in_dim(x, shape, [axis])
