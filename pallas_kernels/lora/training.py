"""The gathered LoRA product with gradients, over a pool that holds only adapters in training.

`y += (x A) B` has the gradients `g = dy B^T`, `dx = g A`, `dA = g^T x` and `dB = (x A)^T dy`. Those of A and B go to
the same tiles of an array with the pool's shape, to which each adapter adds the sum over its own rows, in the order of
its rows: the result does not depend on the other adapters of the step.
"""

from __future__ import annotations

import math
from functools import cache, partial
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp
from jax import lax
from jax.ad_checkpoint import checkpoint_name

from pallas_kernels import plans
from pallas_kernels.lora import xla
from pallas_kernels.lora.api import LoraOptions, backend, kernel_work, lora_expand, lora_shrink
from pallas_kernels.lora.layout import LoraLayout, Stack
from pallas_kernels.lora.plan import gradient_plan
from pallas_kernels.lora.tiles import AdapterTable, LoraTiles
from pallas_kernels.lora.work import GradientWork, gradient_work

Implementation = Literal["xla", "triton"]

HIDDEN = "hidden"
"""Name of `x A`, which the kernels' backward pass needs, for `jax.checkpoint_policies`."""


def training_tile_rows(
    layout: LoraLayout, dtype: Any, length: int, implementation: Implementation | None = None
) -> int:
    """Returns the tile height for `TrainedLora` with the same arguments; it divides `length`, a multiple of 16."""
    name = _backend(layout, dtype, implementation)
    most = plans.find("lora", "training_tile", backend=name)["rows"]
    return length if name == "xla" and length <= most else math.gcd(most, length)


@jax.tree_util.register_pytree_node_class
class TrainedLora:
    """The LoRA products of one micro-step, for its forward and backward passes. A pytree, built once for all layers.

    Args:
      table: the adapters' pages in the training pool.
      tiles: row tiles of exactly `tile_rows` rows each, none of which overlap; those of one adapter follow one another.
        Only `slot`, `first_row`, `rows` and `num_tiles` are read.
      dtype: of the pool, the rows and the outputs.
      tile_rows: height of the tiles, `training_tile_rows` (static).
      max_rank: bound of any projection's rank (static).
      implementation, interpret: as in `LoraProduct`, without "bmm".

    Raises:
      NotImplementedError: as `LoraProduct`.
    """

    def __init__(
        self,
        layout: LoraLayout,
        table: AdapterTable,
        tiles: LoraTiles,
        *,
        dtype: Any,
        tile_rows: int,
        max_rank: int,
        implementation: Implementation | None = None,
        interpret: bool = False,
    ) -> None:
        name = _backend(layout, dtype, implementation)
        self._layout, self._options = layout, LoraOptions(False, tile_rows, max_rank, name, interpret)
        self._work: tuple[tuple[xla.StackRows, ...], LoraTiles] | GradientWork
        if name == "xla":
            self._work = xla.prepare(layout, table.pages, table.ranks, tiles.slot, tiles.num_tiles, max_rank), tiles
        else:
            forward = kernel_work(layout, table.ranks[tiles.slot], tiles, self._options)
            self._work = gradient_work(layout, table.pages, tiles, forward)

    def tree_flatten(self) -> tuple[tuple[Any, ...], tuple[Any, ...]]:
        return (self._work,), (self._layout, self._options)

    @classmethod
    def tree_unflatten(cls, static: tuple[Any, ...], arrays: tuple[Any, ...]) -> TrainedLora:
        product = object.__new__(cls)
        (product._work,) = arrays
        product._layout, product._options = static
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
        return _product(stack, self._layout, self._options, x, y, pool, ledger, self._work)


def _backend(layout: LoraLayout, dtype: Any, implementation: Implementation | None) -> str:
    """The name of the implementation that `TrainedLora` runs."""
    if implementation not in (None, *get_args(Implementation)):
        available = ", ".join(map(repr, get_args(Implementation)))
        raise NotImplementedError(f"TrainedLora: no implementation named {implementation!r}; available: {available}")
    return backend(layout, dtype, implementation=implementation)


@partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def _product(stack: Stack, layout: LoraLayout, options: LoraOptions, *args: Any) -> tuple[jax.Array, jax.Array]:
    return _forward(stack, layout, options, *args)[0]


def _forward(
    stack: Stack,
    layout: LoraLayout,
    options: LoraOptions,
    x: jax.Array,
    y: jax.Array,
    pool: jax.Array,
    ledger: jax.Array,
    work: Any,
) -> tuple[Any, Any]:
    if options.implementation == "xla":
        rows, tiles = work
        own = rows[layout.stacks.index(stack)]
        y = xla.add_tiles(x, y, pool, stack, layout, own, tiles, tiles.num_tiles, options.tile_rows)
        return (y, ledger), (x, None, pool, work)
    planes = lora_shrink(x, pool, work.pages, work.forward, layout, stack, options)
    y = lora_expand(planes, y, pool, work.pages, work.forward, layout, stack, options)
    return (y, ledger), (x, checkpoint_name(planes.sum(0).astype(x.dtype), HIDDEN), pool, work)


def _backward(stack: Stack, layout: LoraLayout, options: LoraOptions, saved: Any, cotangents: Any) -> tuple[Any, ...]:
    x, h, pool, work = saved
    dy, gradient = cotangents
    if options.implementation == "xla":
        rows, tiles = work
        own = rows[layout.stacks.index(stack)]
        dx, gradient = add_gradients(x, dy, pool, gradient, stack, layout, own, tiles, options.tile_rows)
    else:
        dx, gradient = _add_gradients_by_kernels(x, h, dy, pool, gradient, stack, layout, work, options)
    return dx, dy, None, gradient, None


_product.defvjp(_forward, _backward)


def _add_gradients_by_kernels(
    x: jax.Array,
    h: jax.Array,
    dy: jax.Array,
    pool: jax.Array,
    gradient: jax.Array,
    stack: Stack,
    layout: LoraLayout,
    work: GradientWork,
    options: LoraOptions,
) -> tuple[jax.Array, jax.Array]:
    """Does what `add_gradients` does. h: `x A`, `[T, columns]` in x's dtype. For the gradient of A, g is rounded to x's
    dtype; for dx, it is not."""
    from pallas_kernels.lora import training_triton  # imported at use

    facts = {"width": layout.width, "page_size": layout.page_size}
    static: dict[str, Any] = {"tile_rows": options.tile_rows, "interpret": options.interpret}
    plan = gradient_plan(rank=options.max_rank, **facts)
    gradient, planes = training_triton.gradient_b(h, dy, pool, gradient, work, layout, stack, plan=plan, **static)
    g = planes.sum(0)
    plan = gradient_plan(rank=len(stack.projections) * options.max_rank, **facts)
    gradient = training_triton.gradient_a(
        g.astype(x.dtype), x, gradient, work, layout, stack, plan=plan, **static
    )  # fmt: skip
    of_a = _of_a(layout)
    stack = of_a.stacks[layout.stacks.index(stack)]
    dx = lora_expand(g[None], jnp.zeros_like(x), pool, work.pages, work.backward, of_a, stack, options)
    return dx, gradient


@cache
def _of_a(layout: LoraLayout) -> LoraLayout:
    """The layout that has A in B's place: each stack has one projection, of all its ranks, to the input's columns."""
    stacks = (Stack(s.name, s.projections[:1], s.d_in, (s.d_in,)) for s in layout.stacks)
    return LoraLayout(tuple(stacks), layout.page_size, layout.width)


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
