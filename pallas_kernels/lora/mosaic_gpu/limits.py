"""Supported shapes, and the block shapes of a plan after rounding."""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels import devices
from pallas_kernels.lora.layout import LoraLayout, ceil_div

ROWS = 64
"""Rows of one tensor-core product."""

SWIZZLE = 64
"""16-bit columns of one swizzled row in shared memory: every block is a multiple of it."""


def check_served(pool: jax.Array, layout: LoraLayout) -> None:
    """Checks dtype, page size and device.

    Raises:
      NotImplementedError: these kernels do not serve one of them.
    """
    if pool.dtype not in (jnp.bfloat16, jnp.float16):
        raise NotImplementedError(f"mosaic_gpu LoRA: weights of {pool.dtype}; available: bfloat16, float16")
    if layout.page_size not in (8, 16, 32):
        raise NotImplementedError(f"mosaic_gpu LoRA: page_size {layout.page_size}; available: 8, 16, 32")
    device = devices.target()
    if device is not None and device.compute_capability != 90:
        raise NotImplementedError(f"mosaic_gpu LoRA: {device.name}; available: Hopper")


def product_width(tile_rows: int) -> int:
    """Product width for a tile of `tile_rows` tokens."""
    if tile_rows > 248:
        raise NotImplementedError(f"mosaic_gpu LoRA: tiles of {tile_rows} rows; the limit is 248")
    return ceil_div(tile_rows, 8) * 8


def block_width(name: str, block: int, *widths: int) -> int:
    """The largest power of two, at most `block`, that divides all of `widths`."""
    block = math.gcd(1 << block.bit_length() - 1, *widths)
    if block < SWIZZLE:
        raise NotImplementedError(f"mosaic_gpu LoRA: {name} and pool width {widths} must be multiples of {SWIZZLE}")
    return block


def buffers(*types: tuple[tuple[int, ...], Any]) -> list[Any]:
    """Shared memory for arrays of `types`, (shape, dtype) each."""
    size = sum(math.prod(shape) * jnp.dtype(dtype).itemsize for shape, dtype in types)
    limit = devices.DEVICES["h200"].shared_bytes - 2048  # barriers, and each buffer's alignment
    if size > limit:
        raise NotImplementedError(
            f"mosaic_gpu LoRA: the plan needs {size} bytes of shared memory; the limit is {limit}"
        )
    return [plgpu.SMEM(shape, dtype) for shape, dtype in types]


def interpreter(interpret: bool) -> Any:
    """The `interpret` argument of `plgpu.kernel`. Reads of h past its last column are allowed, and unused."""
    if not interpret:
        return False
    return plgpu.InterpretGPUParams(detect_races=True, out_of_bounds_reads="uninitialized")
