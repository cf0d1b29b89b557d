"""The gathered LoRA product with gradients, over a pool that holds only adapters in training.

`y += (x A) B` has the gradients `g = dy B^T`, `dx = g A`, `dA = g^T x` and `dB = (x A)^T dy`. Those of A and B go to
the same tiles of an array with the pool's shape, to which each adapter adds the sum over its own rows, in the order of
its rows: the result does not depend on the other adapters of the step.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels.lora import xla
from pallas_kernels.lora.layout import LoraLayout, Stack
from pallas_kernels.lora.tiles import AdapterTable, LoraTiles


@jax.tree_util.register_pytree_node_class
class TrainedLora:
    """The LoRA products of one micro-step, for its forward and backward passes. A pytree, built once for all layers.

    Args:
      table: the adapters' pages in the training pool.
      tiles: row tiles of exactly `tile_rows` rows each, none of which overlap; only `slot`, `first_row`, `rows` and
        `num_tiles` are read.
      tile_rows: height of the tiles (static).
      max_rank: bound of any projection's rank (static).
    """

    def __init__(
        self, layout: LoraLayout, table: AdapterTable, tiles: LoraTiles, *, tile_rows: int, max_rank: int
    ) -> None:
        self._layout, self._tile_rows = layout, tile_rows
        self._tiles = tiles
        self._rows = xla.prepare(layout, table.pages, table.ranks, tiles.slot, tiles.num_tiles, max_rank)

    def tree_flatten(self) -> tuple[tuple[Any, ...], tuple[Any, ...]]:
        return (self._tiles, self._rows), (self._layout, self._tile_rows)

    @classmethod
    def tree_unflatten(cls, static: tuple[Any, ...], arrays: tuple[Any, ...]) -> TrainedLora:
        product = object.__new__(cls)
        product._tiles, product._rows = arrays
        product._layout, product._tile_rows = static
        return product

    def __call__(
        self, x: jax.Array, y: jax.Array, pool: jax.Array, ledger: jax.Array, stack: Stack
    ) -> tuple[jax.Array, jax.Array]:
        """Adds each row's `x A B` to the fused base product of a stack.

        Args:
          x: `[T, stack.d_in]`.
          y: `[T, stack.d_out]`.
          pool: one layer's pool `[num_pages, 2, page_size, W]`, B with its scale; gets no cotangent itself.
          ledger: any float32 array of the pool's shape. It is returned as it is, and its cotangent on the way back is
            the incoming one plus the gradient of this product's tiles, added in place. So a layer passes one ledger
            through all its products, and the gradient of a step is accumulated without a copy.

        Returns:
          `[T, stack.d_out]` in y's dtype, and the ledger.
        """
        number = self._layout.stacks.index(stack)
        return _product(
            stack, self._layout, self._tile_rows, x, y, pool, ledger, self._rows[number], self._tiles
        )  # fmt: skip


@partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def _product(
    stack: Stack,
    layout: LoraLayout,
    tile_rows: int,
    x: jax.Array,
    y: jax.Array,
    pool: jax.Array,
    ledger: jax.Array,
    rows: xla.StackRows,
    tiles: LoraTiles,
) -> tuple[jax.Array, jax.Array]:
    return xla.add_tiles(x, y, pool, stack, layout, rows, tiles, tiles.num_tiles, tile_rows), ledger


def _forward(stack: Stack, layout: LoraLayout, tile_rows: int, *args: Any) -> tuple[Any, Any]:
    x, _, pool, _, rows, tiles = args
    return _product(stack, layout, tile_rows, *args), (x, pool, rows, tiles)


def _backward(stack: Stack, layout: LoraLayout, tile_rows: int, saved: Any, cotangents: Any) -> tuple[Any, ...]:
    x, pool, rows, tiles = saved
    dy, gradient = cotangents
    dx, gradient = add_gradients(x, dy, pool, gradient, stack, layout, rows, tiles, tile_rows)
    return dx, dy, None, gradient, None, None


_product.defvjp(_forward, _backward)


def add_gradients(
    x: jax.Array,
    dy: jax.Array,
    pool: jax.Array,
    gradient: jax.Array,
    stack: Stack,
    layout: LoraLayout,
    rows: xla.StackRows,
    tiles: LoraTiles,
    tile_rows: int,
) -> tuple[jax.Array, jax.Array]:
    """The backward pass of a stack's product, tile by tile and group of ranks by group.

    Args:
      x: `[T, stack.d_in]`, the product's input.
      dy: `[T, stack.d_out]`, the gradient of its output.
      pool: `[num_pages, 2, page_size, W]`.
      gradient: float32, as the pool; the tiles' gradients are added to it.
      rows: entry i describes the adapter of tile i.

    Returns:
      The gradient of x by way of the adapters, `[T, d_in]` in x's dtype, and `gradient`.
    """
    width, exact = layout.width, lax.Precision.HIGHEST
    flat, columns = pool.reshape(-1, width), xla.projection_columns(stack, layout)

    def tile(i: jax.Array, carry: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        dx, total = carry
        start = tiles.first_row[i]
        x_rows = lax.dynamic_slice_in_dim(x, start, tile_rows).astype(jnp.float32)  # [M, d_in]
        dy_rows = lax.dynamic_slice_in_dim(dy, start, tile_rows).astype(jnp.float32)  # [M, d_out]

        def group(g: jax.Array, carry: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
            dx_rows, total = carry
            a_row = rows.a_row[g, i].reshape(-1, rows.a_row.shape[-1])  # [p * GROUP, A chunks]
            a = xla.gathered(flat, a_row, stack.d_in)  # [p * GROUP, d_in]
            h = jnp.dot(x_rows, a.T, precision=exact)  # [M, p * GROUP]
            dhs = []
            for number, (chunks, own) in enumerate(columns):
                live = rows.b_live[g, i, chunks.start][:, None]  # [GROUP, 1]
                b_row = rows.b_row[g, i, chunks].T  # [GROUP, chunks]
                b = jnp.where(live, xla.gathered(flat, b_row, own.stop - own.start), 0.0)  # [GROUP, d]
                dhs.append(jnp.dot(dy_rows[:, own], b.T, precision=exact))
                h_own = jnp.where(live.T, h[:, number * xla.GROUP : (number + 1) * xla.GROUP], 0.0)
                total = _scattered(total, b_row, jnp.dot(h_own.T, dy_rows[:, own], precision=exact))
            dh = jnp.concatenate(dhs, 1)  # [M, p * GROUP]
            total = _scattered(total, a_row, jnp.dot(dh.T, x_rows, precision=exact))
            return dx_rows + jnp.dot(dh, a, precision=exact), total

        begin = jnp.zeros(x_rows.shape, jnp.float32), total
        dx_rows, total = lax.fori_loop(0, rows.groups[i], group, begin)
        return lax.dynamic_update_slice_in_dim(dx, dx_rows, start, 0), total

    begin = jnp.zeros(x.shape, jnp.float32), gradient.reshape(-1, width)
    dx, total = lax.fori_loop(0, tiles.num_tiles, tile, begin)
    return dx.astype(x.dtype), total.reshape(gradient.shape)


def _scattered(total: jax.Array, row: jax.Array, part: jax.Array) -> jax.Array:
    """Adds a matrix `part [ranks, columns]` to the rows that `xla.gathered` reads."""
    width = total.shape[1]
    whole = jnp.pad(part, ((0, 0), (0, row.shape[1] * width - part.shape[1])))
    return total.at[row].add(whole.reshape(*row.shape, width), **xla.CLIP)
