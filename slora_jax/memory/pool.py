"""The unified pool: device arrays and the pure functions that change them (paper section 5.1)."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.lora import AdapterTable
from pallas_kernels.pool_write import write_pages

Pool = tuple[jax.Array, ...]
"""One array per layer, each `[num_pages, 2, page_size, W]`; a page id names the same row in every layer."""

UPLOAD_PAGES = (1, 4, 32)
"""Pages that one upload call carries: as many large calls as there is work for, then small ones."""


@dataclass(frozen=True)
class PoolShape:
    """Shape of the pool and of the adapter table beside it. width: W, over all shards."""

    num_layers: int
    num_pages: int
    page_size: int
    width: int
    dtype: str
    adapter_slots: int
    max_adapter_pages: int

    @property
    def page_bytes(self) -> int:
        """Bytes of one page over all layers and shards."""
        return self.num_layers * 2 * self.page_size * self.width * jnp.dtype(self.dtype).itemsize

    def pool_struct(self) -> tuple[jax.ShapeDtypeStruct, ...]:
        shape = (self.num_pages, 2, self.page_size, self.width)
        return (jax.ShapeDtypeStruct(shape, jnp.dtype(self.dtype)),) * self.num_layers

    def table_struct(self) -> AdapterTable:
        return AdapterTable(
            pages=jax.ShapeDtypeStruct((self.adapter_slots, self.max_adapter_pages), jnp.int32),  # type: ignore[arg-type]
            ranks=jax.ShapeDtypeStruct((self.adapter_slots, 7), jnp.int32),  # type: ignore[arg-type]
        )

    def make_pool(self, sharding: jax.sharding.Sharding | None = None) -> Pool:
        return tuple(jnp.zeros(s.shape, s.dtype, device=sharding) for s in self.pool_struct())

    def make_table(self, sharding: jax.sharding.Sharding | None = None) -> AdapterTable:
        return jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype, device=sharding), self.table_struct())


def upload_pages(pool: Pool, page: np.ndarray, contents: np.ndarray | jax.Array) -> Pool:
    """Writes pages `contents [num_layers, K, 2, page_size, W]` to ids `page [K]` in every layer, in place; on a CPU by
    a program for one layer, which compiles in less time."""
    if next(iter(pool[0].devices())).platform != "cpu":
        return upload_layers(pool, page, contents)
    if isinstance(contents, np.ndarray):  # once, not once a layer
        contents = jax.device_put(contents)
    return tuple(upload_layer(layer, page, contents, np.int32(i)) for i, layer in enumerate(pool))


@partial(jax.jit, donate_argnums=0)
def upload_layers(pool: Pool, page: jax.Array, contents: jax.Array) -> Pool:
    """`upload_pages` as one program."""
    return tuple(write_pages(layer, page, contents[i]) for i, layer in enumerate(pool))


@partial(jax.jit, donate_argnums=0)
def upload_layer(layer: jax.Array, page: jax.Array, contents: jax.Array, number: jax.Array) -> jax.Array:
    """The part of `upload_pages` that is layer `number`."""
    return write_pages(layer, page, jax.lax.dynamic_index_in_dim(contents, number, keepdims=False))


@partial(jax.jit, donate_argnums=0)
def set_table_row(table: AdapterTable, slot: jax.Array, pages: jax.Array, ranks: jax.Array) -> AdapterTable:
    """Describes a newly resident adapter: `pages [max_adapter_pages]`, `ranks [7]`, at row `slot`."""
    return AdapterTable(pages=table.pages.at[slot].set(pages), ranks=table.ranks.at[slot].set(ranks))


def put_pages(
    contents: np.ndarray, sharding: jax.sharding.Sharding | None, first_column: int = 0
) -> np.ndarray | jax.Array:
    """`contents` for `upload_pages`: each device of `sharding` is sent its own part (None: there is one device). Where
    only some of the devices are this process's, `contents` has their columns, from `first_column` on."""
    if sharding is None:
        return contents
    own, width = len(sharding.addressable_devices), contents.shape[-1]
    shape = (*contents.shape[:-1], width // own * sharding.num_devices)

    def part(index: tuple[slice, ...]) -> np.ndarray:
        start, stop, _ = index[-1].indices(shape[-1])
        return contents[..., start - first_column : stop - first_column]

    return jax.make_array_from_callback(shape, sharding, part)  # type: ignore[arg-type]


def pieces(first: int, count: int) -> Iterator[slice]:
    """Pages `first .. first + count` of an adapter, cut into pieces that `upload_pages` is compiled for."""
    last = first + count
    while first < last:
        size = max(size for size in UPLOAD_PAGES if size <= last - first)
        yield slice(first, first + size)
        first += size


def describe(table: AdapterTable, slot: int, pages: np.ndarray, ranks: np.ndarray) -> AdapterTable:
    """Points the table's row `slot` to the pages of an adapter, int32 `[n]`. The table is donated."""
    row = np.zeros(table.pages.shape[1], np.int32)
    row[: pages.size] = pages
    return set_table_row(table, np.int32(slot), row, np.asarray(ranks, np.int32))


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
    """Puts an adapter's pages `contents [num_layers, n, 2, page_size, W]` at ids `pages [n]` and its table row at
    `slot`. Pool and table are donated. sharding: of such contents, where the pool lies on several devices, and
    first_column as in `put_pages`. Dispatches and returns; the next step waits for the data on the device."""
    for piece in pieces(0, pages.size):
        pool = upload_pages(pool, pages[piece], put_pages(contents[:, piece], sharding, first_column))
    return pool, describe(table, slot, pages, ranks)
