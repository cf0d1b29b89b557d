"""Shapes and arguments of the LoRA programs: a step's rows over a model's layers, spread over resident adapters."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.bench.adapters import Adapters, Ranks, lora_tiles, max_pages, resident, spread
from pallas_kernels.bench.models import Model
from pallas_kernels.bench.pools import random_array, random_pools
from pallas_kernels.bench.size import Size
from pallas_kernels.lora import AdapterTable, LoraLayout, LoraTiles, lora_tile_rows
from pallas_kernels.lora.layout import ceil_div
from pallas_kernels.lora.roofline import layer_work
from pallas_kernels.roofline import Work

DTYPE = jnp.bfloat16


@dataclass(frozen=True)
class Shape:
    """A step's rows over one model's layers. decode: every row is a sequence of its own."""

    size: Size
    model: Model
    rows: int
    decode: bool

    @property
    def regime(self) -> str:
        return "decode" if self.decode else "prefill"

    @property
    def layout(self) -> LoraLayout:
        return self.model.layout(self.size.page_size)

    @property
    def pool(self) -> tuple[int, int, int, int]:
        """Shape of a layer's pool: the same number of bytes for every model."""
        pages = self.size.pool_pages * self.size.model.width // self.model.width
        return pages, 2, self.size.page_size, self.model.width

    def tile_rows(self, backend: str) -> int:
        height = lora_tile_rows(self.layout, DTYPE, decode=self.decode, implementation=backend)  # type: ignore[arg-type]
        return min(self.rows, height)

    def tiles(self, backend: str, slots: np.ndarray, counts: np.ndarray) -> LoraTiles:
        """The tile list of a step whose first rows belong to `slots [n]`, `counts [n]` rows each."""
        tile_rows, seqs = self.tile_rows(backend), self.rows if self.decode else self.size.slots
        entries = ceil_div(self.rows, tile_rows) + min(self.size.slots, seqs)
        return lora_tiles(slots, counts, rows=self.rows, tile_rows=tile_rows, entries=entries, decode=self.decode)

    def structs(self, backend: str, layers: int) -> tuple[Any, ...]:
        """Shapes of `(ys, xs, pools, table, tiles)`."""
        size, none = self.size, np.zeros(0, np.int32)

        def struct(*shape: int, dtype: Any = DTYPE) -> Any:
            return jax.ShapeDtypeStruct(shape, dtype)

        ints = partial(struct, dtype=jnp.int32)
        return (
            tuple(struct(self.rows, s.d_out) for s in self.layout.stacks),
            tuple(struct(self.rows, s.d_in) for s in self.layout.stacks),
            (struct(*self.pool),) * layers,
            AdapterTable(ints(size.slots, max_pages(self.layout, size.max_rank)), ints(size.slots, 7)),
            jax.tree.map(lambda leaf: ints(*leaf.shape), self.tiles(backend, none, none)),
        )


@dataclass(frozen=True, eq=False)
class Batch:
    """The adapters of a step's rows.

    Attributes:
      sets: adapter slots, one set per dispatch, in turn; all sets have the same ranks.
      counts: rows of each adapter of a set.
      poisoned: pages of other adapters are NaN.
    """

    shape: Shape
    adapters: Adapters
    sets: tuple[np.ndarray, ...]
    counts: np.ndarray
    seed: int
    poisoned: bool = False

    @property
    def ranks(self) -> np.ndarray:
        return self.adapters.ranks[self.sets[0]]

    @property
    def work(self) -> Work:
        return layer_work(self.ranks, self.counts, self.shape.layout, DTYPE.dtype.itemsize)

    def pools(self, layers: int) -> tuple[jax.Array, ...]:
        if not self.poisoned:
            return random_pools(self.shape.pool, self.shape.size.layers, self.seed)[:layers]
        owned = np.zeros(self.shape.pool[0], bool)
        owned[np.append(self.adapters.pages[np.concatenate(self.sets)], 0)] = True
        pool = random_array(self.shape.pool, self.seed, scale=0.02)
        return (jnp.where(jnp.asarray(owned)[:, None, None, None], pool, jnp.nan),)

    def xs(self) -> tuple[jax.Array, ...]:
        return self._rows(s.d_in for s in self.shape.layout.stacks)

    def ys(self) -> tuple[jax.Array, ...]:
        """In checks, small relative to the product that is added."""
        return self._rows((s.d_out for s in self.shape.layout.stacks), 0.05 if self.poisoned else 1.0)

    def _rows(self, widths: Iterable[int], scale: float = 1.0) -> tuple[jax.Array, ...]:
        return tuple(random_array((self.shape.rows, d), self.seed + 1000 + i, scale) for i, d in enumerate(widths))

    def arguments(self, backend: str, layers: int) -> list[tuple[Any, ...]]:
        """`(xs, pools, table, tiles)` for each set."""
        xs, pools, table = self.xs(), self.pools(layers), self.adapters.table()
        return [(xs, pools, table, self.shape.tiles(backend, slots, self.counts)) for slots in self.sets]


def make_batch(
    shape: Shape, ranks: Ranks, n: int, *, rows: int, layers: int, seed: int, poisoned: bool = False
) -> Batch:
    """Spreads `rows` rows over `n` adapters. There are enough sets for the weights of their layers to exceed the cache;
    one set, if the activations exceed it. Smaller activations stay in the cache from layer to layer, as in a step."""
    size, rng = shape.size, np.random.default_rng(seed)
    adapters = resident(
        shape.layout, ranks, slots=size.slots, max_rank=size.max_rank, pool_pages=shape.pool[0], rng=rng
    )
    counts = spread(rows, n)
    if ranks == "ragged":
        sets: tuple[np.ndarray, ...] = (adapters.by_rank(rng.permutation(size.slots)[:n]),)
    else:
        ranks_of, itemsize = adapters.ranks[:n], DTYPE.dtype.itemsize
        least, moved = (layer_work(ranks_of, c, shape.layout, itemsize).bytes for c in (np.ones(n), counts))
        count = 1 if moved > size.cache_bytes else min(size.slots // n, ceil_div(size.cache_bytes, layers * least))
        sets = tuple(adapters.by_rank((r * n + np.arange(n)) % size.slots) for r in range(count))
    return Batch(shape, adapters, sets, counts, seed, poisoned)
