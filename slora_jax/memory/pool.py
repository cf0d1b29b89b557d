"""The unified pool: device arrays and the pure functions that update them (paper section 5.1)."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.kv_format import KvDtype, LayerPool, ScaledPages, pages_of
from pallas_kernels.lora import AdapterTable
from pallas_kernels.lora.layout import EXPERT_PROJECTIONS, RANKS, tile_rows
from pallas_kernels.pool_write import write_pages

Pool = tuple[LayerPool, ...]
"""One array per layer, each `[num_pages, 2, page_size, W]`, or as in `pallas_kernels.kv_format` if keys and values have
one byte an element; a page id is the same row in every layer."""

UPLOAD_PAGES = (1, 4, 32)
"""Pages per compiled upload call; an upload uses the largest size that fits, repeatedly."""


@dataclass(frozen=True)
class PoolShape:
    """Shapes of the pool and of the adapter table.

    Attributes:
      page_size: tokens of a page.
      width: W over all shards, elements.
      dtype: of the step's products, and of what the pool holds unless `kv_dtype` says otherwise.
      adapter_slots: rows of the adapter table.
      max_adapter_pages: columns of the adapter table.
      kv_dtype: "fp8", "int8", or "auto" for `dtype`.
      head_dim: columns of a KV head; needed for int8.
      experts: number of experts of a layer whose LoRA is served; 0: none is.
    """

    num_layers: int
    num_pages: int
    page_size: int
    width: int
    dtype: str
    adapter_slots: int
    max_adapter_pages: int
    kv_dtype: str = "auto"
    head_dim: int = 0
    experts: int = 0

    @property
    def narrow_kv(self) -> KvDtype | None:
        """The format of keys and values of one byte; None if they have `dtype`."""
        return None if self.kv_dtype == "auto" else self.kv_dtype  # type: ignore[return-value]

    @property
    def tile_rows(self) -> int:
        """Rows of a tile of adapter weights."""
        return tile_rows(self.page_size, self.kv_dtype)

    @property
    def weight_dtype(self) -> np.dtype:
        """The dtype of adapter weights."""
        return jnp.dtype("bfloat16" if self.narrow_kv else self.dtype)

    @property
    def page_bytes(self) -> int:
        """Bytes of one page over all layers and shards, with its scales."""
        (layer, *_) = self.pool_struct()
        arrays = jax.tree.leaves(layer)
        return self.num_layers * sum(math.prod(a.shape[1:]) * a.dtype.itemsize for a in arrays)

    def pool_struct(self) -> tuple[Any, ...]:
        """`jax.ShapeDtypeStruct`s of a `Pool`."""
        dtype = jnp.uint16 if self.narrow_kv else jnp.dtype(self.dtype)
        layer: Any = jax.ShapeDtypeStruct((self.num_pages, 2, self.tile_rows, self.width), dtype)
        if self.narrow_kv == "int8":
            heads = self.width // self.head_dim
            layer = ScaledPages(layer, jax.ShapeDtypeStruct((self.num_pages, 2, self.page_size, heads), jnp.bfloat16))  # type: ignore[arg-type]
        return (layer,) * self.num_layers

    def table_struct(self) -> AdapterTable:
        def of_slots(*shape: int) -> Any:
            return jax.ShapeDtypeStruct((self.adapter_slots, *shape), jnp.int32)

        experts = of_slots(self.experts, len(EXPERT_PROJECTIONS)) if self.experts else None
        return AdapterTable(of_slots(self.max_adapter_pages), of_slots(RANKS), experts)

    def make_pool(self, sharding: jax.sharding.Sharding | None = None) -> Pool:
        return jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype, device=sharding), self.pool_struct())

    def make_table(self, sharding: jax.sharding.Sharding | None = None) -> AdapterTable:
        return jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype, device=sharding), self.table_struct())


def upload_pages(pool: Pool, page: np.ndarray, contents: np.ndarray | jax.Array) -> Pool:
    """Writes pages in place in every layer. On a CPU one single-layer program is called per layer: it compiles faster.

    Args:
      pool: donated.
      page: page ids, int32 `[K]`.
      contents: `[num_layers, K, 2, tile_rows, W]`, `weight_dtype`.
    """
    if next(iter(pages_of(pool[0]).devices())).platform != "cpu":
        return upload_layers(pool, page, contents)
    if isinstance(contents, np.ndarray):  # transfer once, not once per layer
        contents = jax.device_put(contents)
    return tuple(upload_layer(layer, page, contents, np.int32(i)) for i, layer in enumerate(pool))


@partial(jax.jit, donate_argnums=0)
def upload_layers(pool: Pool, page: jax.Array, contents: jax.Array) -> Pool:
    """`upload_pages` as one program for all layers."""
    return tuple(write_pages(layer, page, contents[i]) for i, layer in enumerate(pool))


@partial(jax.jit, donate_argnums=0)
def upload_layer(layer: LayerPool, page: jax.Array, contents: jax.Array, number: jax.Array) -> LayerPool:
    """`upload_pages` for layer `number` only."""
    return write_pages(layer, page, jax.lax.dynamic_index_in_dim(contents, number, keepdims=False))


@partial(jax.jit, donate_argnums=0)
def set_table_row(table: AdapterTable, slot: jax.Array, row: AdapterTable) -> AdapterTable:
    """Sets row `slot` of the table, which is donated, to `row`: int32 `[max_adapter_pages]`, `[10]` and `[E, 3]`."""
    return jax.tree.map(lambda whole, own: whole.at[slot].set(own), table, row)


def put_pages(
    contents: np.ndarray, sharding: jax.sharding.Sharding | None, first_column: int = 0
) -> np.ndarray | jax.Array:
    """Prepares `contents` for `upload_pages`: sends each device of this process its own columns.

    Args:
      contents: `[..., columns]`, the columns of this process's devices only.
      sharding: sharding over the last axis; None with one device.
      first_column: position of the first of these columns in the whole width.
    """
    if sharding is None:
        return contents
    own, width = len(sharding.addressable_devices), contents.shape[-1]
    shape = (*contents.shape[:-1], width // own * sharding.num_devices)

    def part(index: tuple[slice, ...]) -> np.ndarray:
        start, stop, _ = index[-1].indices(shape[-1])
        return contents[..., start - first_column : stop - first_column]

    return jax.make_array_from_callback(shape, sharding, part)  # type: ignore[arg-type]


def pieces(first: int, count: int) -> Iterator[slice]:
    """Splits pages `first .. first + count` of an adapter into slices of the sizes in `UPLOAD_PAGES`."""
    last = first + count
    while first < last:
        size = max(size for size in UPLOAD_PAGES if size <= last - first)
        yield slice(first, first + size)
        first += size


def describe(table: AdapterTable, slot: int, pages: np.ndarray, ranks: np.ndarray) -> AdapterTable:
    """Sets row `slot` of the table, which is donated, to an adapter with `pages` int32 `[n]` and `ranks` `[7]`, `[10]`
    or `[10 + 3 E]`."""
    row: Any = jax.tree.map(lambda whole: np.zeros(whole.shape[1:], np.int32), table)
    row.pages[: pages.size] = pages
    row.ranks[: len(ranks)] = ranks[:RANKS]
    if row.experts is not None:
        row.experts.reshape(-1)[: max(0, len(ranks) - RANKS)] = ranks[RANKS:]
    return set_table_row(table, np.int32(slot), row)


def upload_adapter(
    pool: Pool,
    table: AdapterTable,
    slot: int,
    pages: np.ndarray,
    ranks: np.ndarray,
    contents: np.ndarray,
    sharding: jax.sharding.Sharding | None = None,
    first_column: int = 0,
) -> tuple[Pool, AdapterTable]:
    """Uploads an adapter's pages and sets its table row.

    Dispatches without waiting; the next step waits for the data on the device. Pool and table are donated.

    Args:
      slot: row of the table.
      pages: page ids, int32 `[n]`.
      ranks: rank of each projection, `[7]`, `[10]` or `[10 + 3 E]` (`pallas_kernels.lora.layout`).
      contents: `[num_layers, n, 2, tile_rows, W]`, `weight_dtype`.
      sharding, first_column: as in `put_pages`.
    """
    for piece in pieces(0, pages.size):
        pool = upload_pages(pool, pages[piece], put_pages(contents[:, piece], sharding, first_column))
    return pool, describe(table, slot, pages, ranks)
