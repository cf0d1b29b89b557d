"""A step's rows over a model's layers, spread over resident adapters: shapes and arguments of the LoRA programs."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.bench.adapters import Adapters, Ranks, lora_tiles, max_pages, num_tiles, resident, spread
from pallas_kernels.bench.models import Model
from pallas_kernels.bench.pools import random_array, random_pools
from pallas_kernels.bench.size import Size
from pallas_kernels.lora import AdapterTable, LoraLayout, lora_tile_rows
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

    def program(self, op: str, *facts: Any) -> str:
        """Name of a program."""
        return "-".join(map(str, (op, self.model.name, self.regime, self.rows, *facts)))

    @property
    def layout(self) -> LoraLayout:
        return self.model.layout(self.size.page_size)

    @property
    def pool(self) -> tuple[int, int, int, int]:
        """Shape of a layer's pool: as many bytes for every model."""
        pages = self.size.pool_pages * self.size.model.width // self.model.width
        return pages, 2, self.size.page_size, self.model.width

    def tiles(self, backend: str) -> tuple[int, int]:
        """Rows of a tile, and entries of the tile list."""
        rows = lora_tile_rows(self.layout, DTYPE, decode=self.decode, implementation=backend)  # type: ignore[arg-type]
        tile_rows = min(self.rows, rows)
        seqs = self.rows if self.decode else self.size.slots
        return tile_rows, num_tiles(self.rows, tile_rows, self.size.slots, seqs)

    def structs(self, backend: str, layers: int) -> dict[str, Any]:
        """Shapes of the arguments of the kernels' programs."""
        size, layout = self.size, self.layout

        def struct(*shape: int, dtype: Any = DTYPE) -> jax.ShapeDtypeStruct:
            return jax.ShapeDtypeStruct(shape, dtype)

        ints = partial(struct, dtype=jnp.int32)
        tile_rows, entries = self.tiles(backend)
        none = np.zeros(0, np.int32)
        tiles = lora_tiles(none, none, rows=self.rows, tile_rows=tile_rows, entries=entries, decode=self.decode)
        return {
            "ys": tuple(struct(self.rows, s.d_out) for s in layout.stacks),
            "xs": tuple(struct(self.rows, s.d_in) for s in layout.stacks),
            "pools": (struct(*self.pool),) * layers,
            "table": AdapterTable(ints(size.slots, max_pages(layout, size.max_rank)), ints(size.slots, 7)),  # type: ignore[arg-type]
            "tiles": jax.tree.map(lambda leaf: ints(*leaf.shape), tiles),
        }


@dataclass(frozen=True, eq=False)
class Batch:
    """Whose rows a step's are: `sets` of adapter slots, taken in turn by dispatches, and the rows of each adapter. The
    adapters of any set are alike. poisoned: what they do not own is NaN in the pool."""

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
        """In checks small beside what is added to them."""
        return self._rows((s.d_out for s in self.shape.layout.stacks), 0.05 if self.poisoned else 1.0)

    def _rows(self, widths: Iterable[int], scale: float = 1.0) -> tuple[jax.Array, ...]:
        return tuple(random_array((self.shape.rows, d), self.seed + 1000 + i, scale) for i, d in enumerate(widths))

    def arguments(self, backend: str, layers: int) -> list[tuple[Any, ...]]:
        """`(xs, pools, table, tiles)`, for each set of slots."""
        shape = self.shape
        tile_rows, entries = shape.tiles(backend)
        xs, pools, table = self.xs(), self.pools(layers), self.adapters.table()
        lists = partial(lora_tiles, rows=shape.rows, tile_rows=tile_rows, entries=entries, decode=shape.decode)
        return [(xs, pools, table, lists(slots, self.counts)) for slots in self.sets]


def make_batch(
    shape: Shape, ranks: Ranks, n: int, *, rows: int, layers: int, seed: int, poisoned: bool = False
) -> Batch:
    """`rows` rows over `n` adapters, in so many sets that the weights of their layers outgrow the cache: one, where the
    activations do. Activations that fit stay in the cache from layer to layer, as they do in a step."""
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
