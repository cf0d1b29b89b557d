"""The gathered LoRA product over the unified pool (paper section 5.3: MBGMM and MBGMV)."""

from __future__ import annotations

import importlib
import warnings
from dataclasses import dataclass
from types import ModuleType
from typing import Any, Literal, Self, get_args

import jax
import jax.numpy as jnp

from pallas_kernels import devices, plans
from pallas_kernels.lora import bmm, xla
from pallas_kernels.lora.layout import LoraLayout, Stack, ceil_div
from pallas_kernels.lora.plan import MIN_BLOCK, ExpandPlan, ShrinkPlan, expand_plan, shrink_plan, tile_rows
from pallas_kernels.lora.work import stack_work

Implementation = Literal["xla", "bmm", "triton", "mosaic_gpu"]
IMPLEMENTATIONS = get_args(Implementation)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class AdapterTable:
    """Which pages each adapter slot owns, on the device. Changed only when an adapter is loaded.

    pages: int32 `[slots, max_pages]`, pool page ids in tile order; 0 (the dummy page) past the adapter's end.
    ranks: int32 `[slots, 7]`, true rank of each projection (`layout.PROJECTIONS`); 0 where it has no LoRA.
    """

    pages: jax.Array
    ranks: jax.Array


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class LoraTiles:
    """The LoRA work of one step: an exact list of row tiles, shared by all layers, stacks and backends.

    Rows of one adapter are contiguous. Adapters with many rows (*dense*) come first, in rows `0 .. dense_rows` and
    tiles `0 .. num_dense`; then the others; rows from `lora_rows` on have none. In each part, high ranks come first.

    slot, first_row, rows: int32 `[NT]`, valid up to `num_tiles`; `rows` is at most the program's tile height.
    row_slot: int32 `[T]`, adapter slot of each row (any valid slot where the row has none).
    num_tiles, num_dense, dense_rows, lora_rows: int32 scalars.
    """

    slot: jax.Array
    first_row: jax.Array
    rows: jax.Array
    row_slot: jax.Array
    num_tiles: jax.Array
    num_dense: jax.Array
    dense_rows: jax.Array
    lora_rows: jax.Array


class StepWork:
    """A step's LoRA work as a pytree, so that one program can make it and another apply it to a layer.

    Attributes:
      ARRAYS: names of the attributes that hold arrays; the others are in STATIC.
    """

    ARRAYS: tuple[str, ...] = ()
    STATIC: tuple[str, ...] = ()

    def tree_flatten(self) -> tuple[tuple[Any, ...], tuple[Any, ...]]:
        return tuple(getattr(self, name) for name in self.ARRAYS), tuple(getattr(self, name) for name in self.STATIC)

    @classmethod
    def tree_unflatten(cls, static: tuple[Any, ...], arrays: tuple[Any, ...]) -> Self:
        work = object.__new__(cls)
        for name, value in zip((*cls.ARRAYS, *cls.STATIC), (*arrays, *static), strict=True):
            setattr(work, name, value)
        return work


@jax.tree_util.register_pytree_node_class
class LoraProduct(StepWork):
    """The LoRA products of one step: made once, before the layers, then called for each layer and stack.

    dtype: of the pool, the rows and the outputs. decode: no adapter is dense: the step's rows are sequences' single
    tokens (static). tile_rows: height of the tiles. max_rank: bound of any projection's rank. implementation: None
    takes what the plan table names for the current trace's device; float32 and CPUs have the reference, "xla". "bmm" is
    the paper's padded baseline, and padding its shape, which must hold the step; None: one that holds any.
    interpret: run GPU kernels on the CPU by their interpreters. shrink, expand: block shapes; None: the plan table's.

    Raises:
      NotImplementedError: the implementation is unknown, or does not take this shape or dtype (it says why).
    """

    ARRAYS = ("_tiles", "_pages", "_padded", "_rows", "_dense", "_work")
    STATIC = ("_layout", "_decode", "_tile_rows", "_options")

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
        implementation: Implementation | None = None,
        interpret: bool = False,
        shrink: ShrinkPlan | None = None,
        expand: ExpandPlan | None = None,
        padding: bmm.Padding | None = None,
    ) -> None:
        self._layout = layout
        self._tiles = tiles
        self._pages = table.pages
        self._decode = decode
        self._tile_rows = tile_rows
        self._options: LoraOptions | None = None
        self._padded: bmm.PaddedWork | None = None
        self._rows: tuple[xla.StackRows, ...] = ()
        self._dense: tuple[xla.StackRows, ...] = ()
        self._work: tuple[jax.Array, ...] = ()
        backend = resolve(implementation, dtype)
        if implementation is None and backend != "xla" and layout.width % MIN_BLOCK:
            reason = f"the pool's width {layout.width} is no multiple of {MIN_BLOCK}"
            warnings.warn(f"LoRA by the XLA reference, which is slow on a GPU: {reason}", stacklevel=2)
            backend = "xla"
        pages, ranks = table.pages, table.ranks
        if backend == "bmm":
            shape = tiles.row_slot.shape[0], pages.shape[0]
            padding = padding or bmm.paddings(*shape, decode=decode, tile_rows=tile_rows)[-1]
            self._padded = bmm.prepare(layout, pages, ranks, tiles.row_slot, tiles.lora_rows, max_rank, padding)
        elif backend == "xla":
            self._rows = xla.prepare(layout, pages, ranks, tiles.row_slot, tiles.lora_rows, max_rank)
            self._dense = () if decode else xla.prepare(layout, pages, ranks, tiles.slot, tiles.num_dense, max_rank)
        else:
            self._options = LoraOptions(decode, tile_rows, max_rank, backend, interpret, shrink, expand)
            self._work = stack_work(layout, ranks, tiles.slot, tiles.first_row, tiles.rows, tiles.num_tiles)

    def __call__(self, x: jax.Array, y: jax.Array, pool: jax.Array, stack: Stack) -> jax.Array:
        """Adds each row's `x A B` (B carries the scale) to the fused base product of a stack.

        Args:
          x: `[T, stack.d_in]`.
          y: `[T, stack.d_out]`.
          pool: one layer's pool `[num_pages, 2, page_size, W]`.

        Returns:
          `[T, stack.d_out]` in y's dtype; products accumulate in float32.
        """
        layout, tiles, number = self._layout, self._tiles, self._layout.stacks.index(stack)
        if self._padded is not None:
            return bmm.add(x, y, pool, stack, layout, self._padded, self._padded.stacks[number])
        if self._options is None:
            if not self._decode:
                dense = self._dense[number]
                y = xla.add_tiles(
                    x, y, pool, stack, layout, dense, tiles.first_row, tiles.rows, tiles.num_dense, self._tile_rows
                )
            return xla.add_rows(x, y, pool, stack, layout, self._rows[number], tiles.dense_rows, tiles.lora_rows)
        h = lora_shrink(x, pool, self._pages, self._work[number], layout, stack, self._options)
        return lora_expand(h, y, pool, self._pages, self._work[number], layout, stack, self._options)


@dataclass(frozen=True)
class LoraOptions:
    """What is static about a step's LoRA products beside their shapes; the fields are `LoraProduct`'s arguments."""

    decode: bool
    tile_rows: int
    max_rank: int
    implementation: str
    interpret: bool = False
    shrink: ShrinkPlan | None = None
    expand: ExpandPlan | None = None

    @property
    def rank_columns(self) -> int:
        """Columns of one projection in h: `max_rank`, rounded up to whole blocks of ranks."""
        return ceil_div(self.max_rank, 32) * 32


def lora_shrink(
    x: jax.Array,
    pool: jax.Array,
    pages: jax.Array,
    work: jax.Array,
    layout: LoraLayout,
    stack: Stack,
    options: LoraOptions,
) -> jax.Array:
    """`x A` of every tile of the step, for all projections of a stack at once (paper: first half of MBGMM and MBGMV).

    Args:
      x: `[T, stack.d_in]`.
      pool: one layer's pool `[num_pages, 2, page_size, W]`. pages: int32 `[slots, max_pages]`, see `AdapterTable`.
      work: int32 `[NT, len(work.FIELDS)]`, this stack's table of `work.stack_work`.

    Returns:
      float32 `[slices, T, ranks]`: sums over slices of the input's columns, to be added up. Where a rank lies is the
      backend's own affair, and its `lora_expand`'s; rows without an adapter and ranks that it lacks are undefined.
    """
    plan = options.shrink or shrink_plan(
        backend=options.implementation, decode=options.decode, rows=x.shape[0], d_in=stack.d_in, width=layout.width
    )
    return _backend(options).lora_shrink(
        x, pool, pages, work, layout, stack,
        max_rank=options.rank_columns, tile_rows=options.tile_rows, plan=plan, interpret=options.interpret,
    )  # fmt: skip


def lora_expand(
    h: jax.Array,
    y: jax.Array,
    pool: jax.Array,
    pages: jax.Array,
    work: jax.Array,
    layout: LoraLayout,
    stack: Stack,
    options: LoraOptions,
) -> jax.Array:
    """`y + (sum over slices of h) B`, for all projections of a stack at once, in y's buffer where y is not used again
    (paper: second half of MBGMM and MBGMV).

    Args:
      h: what `lora_shrink` returned. y: `[T, stack.d_out]`. The others: as there.

    Returns:
      `[T, stack.d_out]`; rows without an adapter are y's to the bit.
    """
    plan = options.expand or expand_plan(
        backend=options.implementation, decode=options.decode, rows=y.shape[0], d_out=stack.d_out, width=layout.width
    )
    return _backend(options).lora_expand(
        h, y, pool, pages, work, layout, stack, tile_rows=options.tile_rows, plan=plan, interpret=options.interpret
    )


def lora_tile_rows(dtype: Any, *, decode: bool, implementation: Implementation | None = None) -> int:
    """The height of tiles that suits `LoraProduct` with the same arguments."""
    return tile_rows(backend=resolve(implementation, dtype), decode=decode)


def _backend(options: LoraOptions) -> ModuleType:
    return importlib.import_module(f"pallas_kernels.lora.{options.implementation}")


def resolve(implementation: str | None, dtype: Any) -> str:
    """The implementation that `LoraProduct` takes: `implementation`, or for None the plan's."""
    if implementation is None:
        on_gpu = devices.target() is not None and jnp.dtype(dtype).itemsize == 2
        return plans.find("lora", "backend")["backend"] if on_gpu else "xla"
    if implementation not in IMPLEMENTATIONS:
        available = ", ".join(map(repr, IMPLEMENTATIONS))
        raise NotImplementedError(f"LoraProduct: no implementation named {implementation!r}; available: {available}")
    if implementation not in ("xla", "bmm") and jnp.dtype(dtype).itemsize != 2:
        raise NotImplementedError(
            f"LoraProduct: {implementation!r} takes bfloat16 and float16, not {dtype}; use 'xla' or another dtype"
        )
    return implementation
