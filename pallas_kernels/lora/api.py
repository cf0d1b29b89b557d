"""The gathered LoRA product over the unified pool (paper section 5.3: MBGMM and MBGMV)."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal, Self, get_args

import jax
import jax.numpy as jnp

from pallas_kernels import fallback, plans
from pallas_kernels.lora import bmm, xla
from pallas_kernels.lora.layout import LoraLayout, Stack, ceil_div
from pallas_kernels.lora.plan import (
    MIN_BLOCK,
    ExpandPlan,
    ShrinkPlan,
    block_ranks,
    expand_plan,
    shrink_plan,
    tile_rows,
)
from pallas_kernels.lora.tiles import AdapterTable, LoraTiles
from pallas_kernels.lora.work import LoraWork, lora_work

Implementation = Literal["xla", "bmm", "triton"]
IMPLEMENTATIONS = get_args(Implementation)


@jax.tree_util.register_pytree_node_class
class LoraProduct:
    """The LoRA products of one step: built once, before the layers, then called for each layer and stack. A pytree, so
    that one program can build it and another apply it to a layer.

    Args:
      dtype: of the pool, the rows and the outputs.
      decode: every row is a sequence's single token, so no adapter is dense (static).
      tile_rows: height of the tiles, `lora_tile_rows`.
      max_rank: bound of any projection's rank.
      split: prepares for `shrink` and `expand`, between which shards exchange `x A`, instead of `__call__` (static).
      implementation: None: the plan table's for the current trace's device; the reference "xla" for float32, on CPUs,
        and, with a warning, for shapes that the planned one does not serve. "bmm" is the paper's padded baseline.
      interpret: run GPU kernels on the CPU by their interpreters.
      shrink_plan, expand_plan: block shapes; None: the plan table's.
      padding: shape of "bmm", which must hold the step; None: the largest.

    Raises:
      NotImplementedError: the implementation is unknown, or does not serve the shape, the dtype or `split`.
    """

    _ARRAYS = ("_tiles", "_pages", "_padded", "_row_weights", "_tile_weights", "_work")
    _STATIC = ("_layout", "_dtype", "_split", "_options")

    def __init__(
        self,
        layout: LoraLayout,
        table: AdapterTable,
        tiles: LoraTiles,
        *,
        dtype: Any,
        decode: bool,
        tile_rows: int,
        max_rank: int,
        split: bool = False,
        implementation: Implementation | None = None,
        interpret: bool = False,
        shrink_plan: ShrinkPlan | None = None,
        expand_plan: ExpandPlan | None = None,
        padding: bmm.Padding | None = None,
    ) -> None:
        name = backend(layout, dtype, split, implementation)
        self._layout, self._dtype, self._split = layout, jnp.dtype(dtype), split
        self._options = LoraOptions(decode, tile_rows, max_rank, name, interpret, shrink_plan, expand_plan, split)
        self._tiles = tiles
        self._pages = pages = table.pages
        self._padded: bmm.PaddedWork | None = None
        self._row_weights: tuple[xla.StackRows, ...] = ()
        self._tile_weights: tuple[xla.StackRows, ...] = ()
        self._work: LoraWork | None = None
        if name == "bmm":
            shape = tiles.row_slot.shape[0], pages.shape[0]
            padding = padding or bmm.paddings(*shape, decode=decode, tile_rows=tile_rows)[-1]
            self._padded = bmm.prepare(layout, pages, table.ranks, tiles.row_slot, tiles.lora_rows, max_rank, padding)
        elif name == "xla":
            if not split:
                self._row_weights = xla.prepare(layout, pages, table.ranks, tiles.row_slot, tiles.lora_rows, max_rank)
            if split or not decode:
                count = tiles.num_tiles if split else tiles.num_dense
                self._tile_weights = xla.prepare(layout, pages, table.ranks, tiles.slot, count, max_rank)
        else:
            self._work = kernel_work(layout, table.ranks[tiles.slot], tiles, self._options)

    def tree_flatten(self) -> tuple[tuple[Any, ...], tuple[Any, ...]]:
        return tuple(getattr(self, name) for name in self._ARRAYS), tuple(getattr(self, name) for name in self._STATIC)

    @classmethod
    def tree_unflatten(cls, static: tuple[Any, ...], arrays: tuple[Any, ...]) -> Self:
        product = object.__new__(cls)
        for name, value in zip((*cls._ARRAYS, *cls._STATIC), (*arrays, *static), strict=True):
            setattr(product, name, value)
        return product

    def __call__(self, x: jax.Array, y: jax.Array, pool: jax.Array, stack: Stack) -> jax.Array:
        """Adds each row's `x A B` (B carries the scale) to the fused base product of a stack.

        Args:
          x: `[T, stack.d_in]`.
          y: `[T, stack.d_out]`.
          pool: one layer's pool `[num_pages, 2, page_size, W]`.

        Returns:
          `[T, stack.d_out]` in y's dtype; products accumulate in float32.
        """
        self._check_split(False)
        layout, tiles, options, number = self._layout, self._tiles, self._options, self._layout.stacks.index(stack)
        if self._padded is not None:
            return bmm.add(x, y, pool, stack, layout, self._padded, self._padded.stacks[number])
        if options.implementation == "xla":
            if not options.decode:
                dense = self._tile_weights[number]
                y = xla.add_tiles(x, y, pool, stack, layout, dense, tiles, tiles.num_dense, options.tile_rows)
            weights = self._row_weights[number]
            return xla.add_rows(x, y, pool, stack, layout, weights, tiles.dense_rows, tiles.lora_rows)
        assert self._work is not None
        h = lora_shrink(x, pool, self._pages, self._work, layout, stack, options)
        return lora_expand(h, y, pool, self._pages, self._work, layout, stack, options)

    def shrink(self, x: jax.Array, pool: jax.Array, stack: Stack) -> jax.Array:
        """`x A` of every row with an adapter, after `split=True`.

        Returns:
          `[T, projections, ceil(max_rank / stack.rank_shards)]` in the pool's dtype. Rows without an adapter and ranks
          past an adapter's are undefined. Products accumulate in float32.
        """
        self._check_split(True)
        layout, tiles, options, number = self._layout, self._tiles, self._options, self._layout.stacks.index(stack)
        ranks = stack.a_ranks(options.max_rank)
        if options.implementation == "xla":
            weights = self._tile_weights[number]
            h = xla.shrink_tiles(x, pool, stack, layout, weights, tiles, tiles.num_tiles, options.tile_rows)
        else:
            assert self._work is not None
            slices = lora_shrink(x, pool, self._pages, self._work, layout, stack, replace(options, max_rank=ranks))
            h = slices.sum(0).reshape(x.shape[0], len(stack.projections), -1)
        return h[:, :, :ranks].astype(self._dtype)

    def expand(self, h: jax.Array, y: jax.Array, pool: jax.Array, stack: Stack) -> jax.Array:
        """Returns `y + h B`, after `split=True`. Rows without an adapter equal y to the bit.

        Args:
          h: `[T, projections, ranks]`, at least `max_rank` ranks.
          y: `[T, stack.d_out]`.
        """
        self._check_split(True)
        layout, tiles, options, number = self._layout, self._tiles, self._options, self._layout.stacks.index(stack)
        if options.implementation == "xla":
            weights = self._tile_weights[number]
            h = _widen(h, weights.b_row.shape[0] * xla.GROUP)
            return xla.expand_tiles(h, y, pool, stack, layout, weights, tiles, tiles.num_tiles, options.tile_rows)
        h = _widen(h, options.rank_columns).reshape(1, h.shape[0], -1)
        assert self._work is not None
        return lora_expand(h, y, pool, self._pages, self._work, layout, stack, options)

    def _check_split(self, needed: bool) -> None:
        if self._split != needed:
            what = "shrink and expand need" if needed else "the whole product needs"
            raise ValueError(f"LoraProduct: split={self._split}; {what} split={needed}")


def _widen(h: jax.Array, ranks: int) -> jax.Array:
    """float32 `[T, projections, ranks]`, cut or padded with zeros."""
    h = h[:, :, :ranks].astype(jnp.float32)
    return jnp.pad(h, ((0, 0), (0, 0), (0, ranks - h.shape[2])))


def backend(layout: LoraLayout, dtype: Any, split: bool = False, implementation: Implementation | None = None) -> str:
    """Returns the name of the implementation that `LoraProduct` runs with the same arguments."""
    check = partial(_check_served, layout, dtype, split)
    return fallback.choose("LoRA", implementation, dtype, lambda: plans.find("lora", "backend")["backend"], check)


def lora_tile_rows(
    layout: LoraLayout,
    dtype: Any,
    *,
    decode: bool,
    split: bool = False,
    implementation: Implementation | None = None,
) -> int:
    """Returns the tile height for `LoraProduct` with the same arguments."""
    return tile_rows(backend=backend(layout, dtype, split, implementation), decode=decode)


def _check_served(layout: LoraLayout, dtype: Any, split: bool, name: str) -> str:
    """Returns `name`. Raises NotImplementedError if it is unknown or does not serve the arguments."""
    if name not in IMPLEMENTATIONS:
        available = ", ".join(map(repr, IMPLEMENTATIONS))
        raise NotImplementedError(f"LoraProduct: no implementation named {name!r}; available: {available}")
    if split and name == "bmm":
        raise NotImplementedError(
            "LoraProduct.shrink: 'bmm' multiplies padded copies of A and B in one go; available: 'xla', 'triton'"
        )
    if name == "triton":
        if jnp.dtype(dtype).itemsize != 2:
            raise NotImplementedError(
                f"LoraProduct: 'triton' takes bfloat16 and float16, not {dtype}; use 'xla' or another dtype"
            )
        if layout.width % MIN_BLOCK:
            raise NotImplementedError(
                f"LoraProduct: 'triton' takes a pool width that is a multiple of {MIN_BLOCK}, not {layout.width}; "
                "use 'xla'"
            )
    return name


@dataclass(frozen=True)
class LoraOptions:
    """Static settings of a step's LoRA products; the fields are `LoraProduct`'s arguments.

    With `split`, the ranks of projection p begin at column `p * rank_columns` of h. Otherwise, h has the ranks of a
    stack one after another, as its tiles do.
    """

    decode: bool
    tile_rows: int
    max_rank: int
    implementation: str
    interpret: bool = False
    shrink_plan: ShrinkPlan | None = None
    expand_plan: ExpandPlan | None = None
    split: bool = False

    @property
    def rank_columns(self) -> int:
        """Columns of h for each projection of a stack: `max_rank`, rounded up to whole blocks of ranks."""
        return ceil_div(self.max_rank, 32) * 32


def kernel_work(
    layout: LoraLayout, ranks: jax.Array, tiles: LoraTiles, options: LoraOptions, base: jax.Array | int = 0
) -> LoraWork:
    """Returns the work tables of `lora_shrink` and `lora_expand`; `ranks`, `base` as in `lora_work`."""
    facts = {"backend": options.implementation, "decode": options.decode}
    block_r = block_ranks(layout.page_size, **facts)
    return lora_work(layout, ranks, tiles, max_rank=options.max_rank, block_r=block_r, base=base)


def lora_shrink(
    x: jax.Array,
    pool: jax.Array,
    pages: jax.Array,
    work: LoraWork,
    layout: LoraLayout,
    stack: Stack,
    options: LoraOptions,
) -> jax.Array:
    """Computes `x A` of every tile of the step, for all projections of a stack (paper: first half of MBGMM and MBGMV).

    Args:
      x: `[T, stack.d_in]`.
      pool: one layer's pool `[num_pages, 2, page_size, W]`.
      pages: int32 `[slots, max_pages]`, see `AdapterTable`.
      work: the step's, of `kernel_work`.

    Returns:
      float32 `[slices, T, projections * options.rank_columns]`: sums over slices of the input's columns, still to be
      added up. Rows without an adapter and ranks past an adapter's are undefined.
    """
    plan = options.shrink_plan or shrink_plan(
        decode=options.decode, rows=x.shape[0], d_in=stack.d_in, width=layout.width
    )
    from pallas_kernels.lora import triton  # imported at use

    return triton.lora_shrink(
        x, pool, pages, work, layout, stack,
        columns=len(stack.projections) * options.rank_columns, by_projection=options.split, tile_rows=options.tile_rows,
        block_r=block_ranks(layout.page_size, backend=options.implementation, decode=options.decode),
        plan=plan, interpret=options.interpret,
    )  # fmt: skip


def lora_expand(
    h: jax.Array,
    y: jax.Array,
    pool: jax.Array,
    pages: jax.Array,
    work: LoraWork,
    layout: LoraLayout,
    stack: Stack,
    options: LoraOptions,
) -> jax.Array:
    """Computes `y + (sum over slices of h) B` for all projections of a stack (paper: second half of MBGMM and MBGMV).

    Args:
      h: result of `lora_shrink`.
      y: `[T, stack.d_out]`; its buffer is reused if y is not read again.
      pool, pages, work, layout, stack, options: as in `lora_shrink`.

    Returns:
      `[T, stack.d_out]`; rows without an adapter equal y to the bit.
    """
    plan = options.expand_plan or expand_plan(
        decode=options.decode, rows=y.shape[0], d_out=stack.d_out, width=layout.width, page_size=layout.page_size
    )
    from pallas_kernels.lora import triton  # imported at use

    return triton.lora_expand(
        h, y, pool, pages, work, layout, stack,
        by_projection=options.split, tile_rows=options.tile_rows, plan=plan, interpret=options.interpret,
    )  # fmt: skip
