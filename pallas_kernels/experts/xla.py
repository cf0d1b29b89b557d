"""The XLA reference of the products with experts: an exact loop over tiles."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels.weight_format import Kernels, ScaledKernels, codes_of, dequantised

TILE_ROWS = 16
"""Most rows of one expert in one product."""


def gated(fused: jax.Array, activation: str, dtype: Any) -> jax.Array:
    """Activates the gate of `gate | up` `[..., 2 ffn]` in float32 and multiplies: `[..., ffn]` in `dtype`."""
    gate, up = jnp.split(fused.astype(jnp.float32), 2, axis=-1)
    active = jax.nn.silu(gate) if activation == "silu" else jax.nn.gelu(gate, approximate=True)
    return (active * up).astype(dtype)


Add = Callable[[jax.Array, jax.Array], jax.Array]
"""`(x [R, d_in], y [R, d_out]) -> y` and a further product of each row."""


def expert_outputs(
    x: jax.Array,
    chosen: jax.Array,
    weights: jax.Array,
    gate_up: Kernels,
    down: Kernels,
    activation: str,
    lora: Callable[[jax.Array], tuple[Add, Add]] | None = None,
) -> jax.Array:
    """See `api.expert_outputs`."""
    order = jnp.argsort(chosen.reshape(-1), stable=True)  # [T k], the rows by expert
    sizes = jnp.bincount(chosen.reshape(-1), length=codes_of(gate_up).shape[0]).astype(jnp.int32)
    add_gate_up, add_down = (None, None) if lora is None else lora(order)
    with jax.named_scope("gate_up"):
        rows = x[order // chosen.shape[1]]
        fused = grouped_product(rows, gate_up, sizes)  # [T k, 2 ffn]
        fused = fused if add_gate_up is None else add_gate_up(rows, fused)
        hidden = gated(fused, activation, x.dtype)
    with jax.named_scope("down"):
        outputs = grouped_product(hidden, down, sizes)  # [T k, d]
        outputs = outputs if add_down is None else add_down(hidden, outputs)
        outputs = jnp.zeros_like(outputs).at[order].set(outputs).reshape(*chosen.shape, -1)  # [T, k, d]
        return (outputs * weights[..., None]).sum(1).astype(x.dtype)


@jax.custom_vjp
def grouped_product(x: jax.Array, kernels: Kernels, sizes: jax.Array) -> jax.Array:
    """Multiplies each group of rows by its own kernel. Differentiable in `x` alone.

    `jax.lax.ragged_dot` would multiply all rows by all kernels, on a CPU and on a GPU.

    Args:
      x: `[R, d_in]`, the rows of group 0, then those of group 1, and so on.
      kernels: `[E, d_in, d_out]`.
      sizes: int32 `[E]`, rows of each group; rows past their sum have results of zeros.

    Returns:
      `[R, d_out]` in `x`'s dtype.
    """
    return _tiled(x, kernels, sizes, 1)


def _tiled(x: jax.Array, kernels: Kernels, sizes: jax.Array, contracted: int) -> jax.Array:
    """Multiplies tiles of at most `TILE_ROWS` rows of one group, one after another. contracted: axis of the kernels."""
    num_rows, tile_rows = x.shape[0], min(TILE_ROWS, x.shape[0])
    tiles = -(-sizes // tile_rows)
    row_ends, tile_ends = jnp.cumsum(sizes), jnp.cumsum(tiles)

    def tile(i: jax.Array, out: jax.Array) -> jax.Array:
        group = jnp.searchsorted(tile_ends, i, side="right")
        number = i - (tile_ends[group] - tiles[group])
        first = row_ends[group] - sizes[group] + number * tile_rows
        start = jnp.clip(first, 0, num_rows - tile_rows)
        rows = jax.lax.dynamic_slice_in_dim(x, start, tile_rows)
        product = _product(rows, kernels, group, contracted)
        row = start + jnp.arange(tile_rows)
        own = (row >= first) & (row < jnp.minimum(first + tile_rows, row_ends[group]))
        old = jax.lax.dynamic_slice_in_dim(out, start, tile_rows)
        return jax.lax.dynamic_update_slice_in_dim(out, jnp.where(own[:, None], product, old), start, 0)

    out = jnp.zeros((num_rows, codes_of(kernels).shape[3 - contracted]), x.dtype)
    return jax.lax.fori_loop(0, tile_ends[-1], tile, out)


def _product(rows: jax.Array, kernels: Kernels, group: jax.Array, contracted: int) -> jax.Array:
    """Multiplies a tile's rows by the kernel of its group. A scale of all inputs multiplies the sums, in float32."""
    kernel, scale = codes_of(kernels)[group], None
    if isinstance(kernels, ScaledKernels):
        scale = kernels.scale[group]  # [groups, d_out]
        if len(scale) > 1:
            kernel, scale = dequantised(kernel, scale, rows.dtype), None
        elif contracted == 2:
            rows, scale = (rows * scale).astype(rows.dtype), None
    product = jax.lax.dot_general(
        rows,
        kernel.astype(rows.dtype),
        (((1,), (contracted - 1,)), ((), ())),
        precision=jax.lax.Precision.HIGHEST if rows.dtype == jnp.float32 else None,
        preferred_element_type=jnp.float32,
    )
    return (product if scale is None else product * scale).astype(rows.dtype)


def _forward(x: jax.Array, kernels: Kernels, sizes: jax.Array) -> tuple[jax.Array, Any]:
    return grouped_product(x, kernels, sizes), (kernels, sizes)


def _backward(saved: Any, slope: jax.Array) -> tuple[jax.Array, None, None]:
    kernels, sizes = saved
    return _tiled(slope, kernels, sizes, 2), None, None


grouped_product.defvjp(_forward, _backward)
