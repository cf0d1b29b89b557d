"""Cases of the LoRA products: the whole product of a layer, shrink and expand alone, and what they compete with."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache, partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from pallas_kernels.bench import peers
from pallas_kernels.bench.adapters import Adapters, Ranks, lora_tiles, max_pages, num_tiles, resident, spread
from pallas_kernels.bench.case import Case, Program, Section, System, chain, repeat
from pallas_kernels.bench.models import Model
from pallas_kernels.bench.pools import random_array, random_pools, release
from pallas_kernels.bench.size import Size
from pallas_kernels.lora import AdapterTable, LoraLayout, LoraProduct, LoraTiles, lora_tile_rows
from pallas_kernels.lora.api import LoraOptions, lora_expand, lora_shrink
from pallas_kernels.lora.layout import ceil_div
from pallas_kernels.lora.roofline import expand_work, layer_work, shrink_work
from pallas_kernels.lora.work import stack_work
from pallas_kernels.roofline import Work

DTYPE = jnp.bfloat16
TOLERANCE = 1e-2
"""Of checks: what bfloat16 allows, and far below one wrong row."""
PEER_LAYERS = 8
"""Most layers of a competitor's dispatch."""


@dataclass(frozen=True)
class Grid:
    """decode: rows of a step, and how many adapters they are spread over. prefill_rows, prefill_adapters: likewise.
    ranks: at main_rank everything is measured over all numbers of adapters, at the others with main_adapters; the
    product alone is measured at all ranks and numbers. loop_adapters: most that the unrolled loop is measured with.
    second_decode, second_ranks: of the second model. check_adapters: of the checks."""

    decode: tuple[tuple[int, tuple[int, ...]], ...]
    prefill_rows: int
    prefill_adapters: tuple[int, ...]
    ranks: tuple[Ranks, ...]
    main_rank: int
    main_adapters: int
    peer_ranks: tuple[Ranks, ...]
    loop_adapters: int
    second_decode: tuple[int, tuple[int, ...]]
    second_ranks: tuple[Ranks, ...]
    check_adapters: int


FULL = Grid(
    decode=((64, (1, 4, 16, 64)), (256, (16, 64, 256))),
    prefill_rows=4096,
    prefill_adapters=(1, 4, 16, 64, 256),
    ranks=(8, 16, 32, 64, 128, "mixed"),
    main_rank=16,
    main_adapters=64,
    peer_ranks=(64, "mixed"),
    loop_adapters=64,
    second_decode=(64, (16, 64)),
    second_ranks=(16, "mixed"),
    check_adapters=16,
)
MINIATURE = Grid(
    decode=((4, (1, 4)),),
    prefill_rows=16,
    prefill_adapters=(2,),
    ranks=(8, "mixed"),
    main_rank=8,
    main_adapters=4,
    peer_ranks=("mixed",),
    loop_adapters=2,
    second_decode=(4, (2,)),
    second_ranks=(8,),
    check_adapters=2,
)


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
        tile_rows = min(self.rows, lora_tile_rows(DTYPE, decode=self.decode, implementation=backend))  # type: ignore[arg-type]
        seqs = self.rows if self.decode else self.size.slots
        return tile_rows, num_tiles(self.rows, tile_rows, self.size.slots, seqs)

    def structs(self, backend: str, layers: int) -> dict[str, Any]:
        """Shapes of the arguments of the kernels' programs."""
        size, layout = self.size, self.layout

        def struct(*shape: int, dtype: Any = DTYPE) -> jax.ShapeDtypeStruct:
            return jax.ShapeDtypeStruct(shape, dtype)

        ints = partial(struct, dtype=jnp.int32)
        entries = self.tiles(backend)[1]
        return {
            "ys": tuple(struct(self.rows, s.d_out) for s in layout.stacks),
            "xs": tuple(struct(self.rows, s.d_in) for s in layout.stacks),
            "pools": (struct(*self.pool),) * layers,
            "table": AdapterTable(ints(size.slots, max_pages(layout, size.max_rank)), ints(size.slots, 7)),  # type: ignore[arg-type]
            "tiles": LoraTiles(*[ints(entries)] * 3, ints(self.rows), *[ints()] * 4),  # type: ignore[arg-type]
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

    def _rows(self, widths: Iterator[int], scale: float = 1.0) -> tuple[jax.Array, ...]:
        return tuple(random_array((self.shape.rows, d), self.seed + 1000 + i, scale) for i, d in enumerate(widths))

    def arguments(self, backend: str, layers: int) -> list[tuple[Any, ...]]:
        """`(xs, pools, table, tiles)`, for each set of slots."""
        shape = self.shape
        tile_rows, entries = shape.tiles(backend)
        xs, pools, table = self.xs(), self.pools(layers), self.adapters.table()
        lists = partial(lora_tiles, rows=shape.rows, tile_rows=tile_rows, entries=entries, decode=shape.decode)
        return [(xs, pools, table, lists(slots, self.counts)) for slots in self.sets]


@cache
def product(shape: Shape, backend: str, layers: int) -> Program:
    """`(ys, xs, pools, table, tiles) -> ys`: the products of all stacks in every layer, one after another."""

    def run(ys: Any, xs: Any, pools: Any, table: AdapterTable, tiles: LoraTiles) -> Any:
        size, layout, ys = shape.size, shape.layout, list(ys)
        lora = LoraProduct(
            layout, table, tiles, dtype=DTYPE, decode=shape.decode, tile_rows=shape.tiles(backend)[0],
            max_rank=size.max_rank, implementation=backend, interpret=size.interpret and backend != "xla",  # type: ignore[arg-type]
        )  # fmt: skip
        for pool, (i, stack) in itertools.product(pools, enumerate(layout.stacks)):
            ys[i] = lora(xs[i], ys[i], pool, stack)
            xs, ys[i] = lax.optimization_barrier((xs, ys[i]))  # the next product follows this one
        return tuple(ys)

    return _program(shape.program("lora", backend, layers), run, shape, backend, layers, "ys")


@cache
def shrink(shape: Shape, backend: str, layers: int) -> Program:
    """`(xs, pools, table, tiles) -> h` of every layer and stack."""

    def run(xs: Any, pools: Any, table: AdapterTable, tiles: LoraTiles) -> Any:
        options, work, hs = _options(shape, backend), _work(shape, table, tiles), []
        for pool, (i, stack) in itertools.product(pools, enumerate(shape.layout.stacks)):
            h = lora_shrink(xs[i], pool, table.pages, work[i], shape.layout, stack, options)
            xs, h = lax.optimization_barrier((xs, h))
            hs.append(h)
        return tuple(hs)

    return _program(shape.program("lora_shrink", backend, layers), run, shape, backend, layers)


@cache
def expand(shape: Shape, backend: str, layers: int) -> Program:
    """`(ys, hs, pools, table, tiles) -> ys`: h `[slices, T, ...]` is the same in every layer."""

    def run(ys: Any, hs: Any, pools: Any, table: AdapterTable, tiles: LoraTiles) -> Any:
        options, work, ys = _options(shape, backend), _work(shape, table, tiles), list(ys)
        for pool, (i, stack) in itertools.product(pools, enumerate(shape.layout.stacks)):
            ys[i] = lora_expand(hs[i], ys[i], pool, table.pages, work[i], shape.layout, stack, options)
            hs, ys[i] = lax.optimization_barrier((hs, ys[i]))
        return tuple(ys)

    def shapes() -> tuple[Any, ...]:
        structs = shape.structs(backend, layers)
        return structs["ys"], hidden(shape, backend), structs["pools"], structs["table"], structs["tiles"]

    name = shape.program("lora_expand", backend, layers)
    return Program(name, jax.jit(run, donate_argnums=0), shapes)


def hidden(shape: Shape, backend: str) -> tuple[jax.ShapeDtypeStruct, ...]:
    """What shrink leaves for expand, of each stack."""
    one = shrink(shape, backend, 1)
    return jax.eval_shape(one.function, *one.shapes())


def _options(shape: Shape, backend: str) -> LoraOptions:
    return LoraOptions(shape.decode, shape.tiles(backend)[0], shape.size.max_rank, backend, shape.size.interpret)


def _work(shape: Shape, table: AdapterTable, tiles: LoraTiles) -> tuple[jax.Array, ...]:
    return stack_work(shape.layout, table.ranks, tiles.slot, tiles.first_row, tiles.rows, tiles.num_tiles)


def _program(name: str, run: Callable[..., Any], shape: Shape, backend: str, layers: int, *donated: str) -> Program:
    names = (*donated, "xs", "pools", "table", "tiles")
    return Program(
        name,
        jax.jit(run, donate_argnums=tuple(range(len(donated)))),
        lambda: tuple(map(shape.structs(backend, layers).__getitem__, names)),
    )


@cache
def ragged_dot(shape: Shape, n: int, rank: int, layers: int) -> Program:
    """`(ys, xs, weights of every layer, counts [n]) -> ys` by `jax.lax.ragged_dot`."""

    def run(ys: Any, xs: Any, weights: Any, counts: jax.Array) -> Any:
        ys = list(ys)
        for layer, i in itertools.product(weights, range(len(ys))):
            ys[i] = peers.add_ragged_dot(xs[i], ys[i], layer[i], counts)
            xs, ys[i] = lax.optimization_barrier((xs, ys[i]))
        return tuple(ys)

    def shapes() -> tuple[Any, ...]:
        structs = shape.structs("xla", layers)
        weights = (peers.weights_struct(shape.layout, n, rank),) * layers
        return structs["ys"], structs["xs"], weights, jax.ShapeDtypeStruct((n,), jnp.int32)

    return Program(shape.program("lora", "ragged_dot", n, rank, layers), jax.jit(run, donate_argnums=0), shapes)


@cache
def loop(shape: Shape, counts: tuple[int, ...], rank: int, layers: int) -> Program:
    """`(ys, xs, weights of every layer, stack and adapter) -> ys`, adapter by adapter, unrolled."""

    def run(ys: Any, xs: Any, weights: Any) -> Any:
        ys = list(ys)
        for layer, i in itertools.product(weights, range(len(ys))):
            ys[i] = peers.add_one_by_one(xs[i], ys[i], layer[i], counts)
            xs, ys[i] = lax.optimization_barrier((xs, ys[i]))
        return tuple(ys)

    def shapes() -> tuple[Any, ...]:
        structs = shape.structs("xla", layers)
        matrices = jax.eval_shape(peers.one_by_one, peers.weights_struct(shape.layout, len(counts), rank))
        return structs["ys"], structs["xs"], (matrices,) * layers

    name = shape.program("lora", "loop", sum(counts), len(counts), rank, layers)
    return Program(name, jax.jit(run, donate_argnums=0), shapes)


def kernel(batch: Batch, backend: str, layers: int) -> System:
    """A backend's whole product."""
    return System(
        backend,
        product(batch.shape, backend, layers),
        chain(batch.ys, lambda: batch.arguments(backend, layers)),
        repeats=layers,
    )


def competitors(batch: Batch, most: int, layers: int) -> Iterator[System]:
    """`ragged_dot`, and the loop over up to `most` adapters."""
    shape, counts = batch.shape, tuple(batch.counts.tolist())
    n, rank = len(counts), int(batch.ranks.max())

    def weights() -> list[Any]:
        table, pools = batch.adapters.table(), batch.pools(layers)
        return [
            tuple(peers.contiguous(pool, table, jnp.asarray(slots), shape.layout, rank) for pool in pools)
            for slots in batch.sets
        ]

    def for_ragged_dot() -> list[tuple[Any, ...]]:
        xs, of_adapter = batch.xs(), jnp.asarray(batch.counts, jnp.int32)
        return [(xs, w, of_adapter) for w in weights()]

    def for_loop() -> list[tuple[Any, ...]]:
        xs = batch.xs()
        return [(xs, tuple(map(peers.one_by_one, w))) for w in weights()]

    yield System("ragged_dot", ragged_dot(shape, n, rank, layers), chain(batch.ys, for_ragged_dot), repeats=layers)
    if n > most:
        yield System("loop", skip=f"an unrolled loop over {n} adapters compiles for minutes; measured up to {most}")
    else:
        yield System("loop", loop(shape, counts, rank, layers), chain(batch.ys, for_loop), repeats=layers)


def section(size: Size, seed: int) -> Section:
    """Every case."""
    grid = MINIATURE if size.miniature else FULL
    return Section("lora", [*checks(size, grid, seed), *_measured(size, grid, seed)], release)


def checks(size: Size, grid: Grid, seed: int) -> Iterator[Case]:
    """Kernels at the shapes that are timed, in one layer whose other pages are NaN, adapters of any ranks, some rows
    without an adapter; and the competitors."""
    rows = [(rows, True) for rows, _ in grid.decode] + [(grid.prefill_rows, False)]
    for number, (count, decode) in enumerate(rows):
        shape, n = Shape(size, size.model, count, decode), min(grid.check_adapters, count // 2)
        batch = _batch(shape, "ragged", n, rows=count - count // 4, layers=1, seed=seed + 7 * number, poisoned=True)
        systems = tuple(kernel(batch, backend, 1) for backend in ("xla", *size.backends))
        facts = {"rows": count, "adapters": n, "rank": "ragged"}
        yield Case("lora", shape.regime, facts, batch.work, systems, tolerance=TOLERANCE)
        batch = _batch(shape, "ragged", n, rows=count, layers=1, seed=seed + 7 * number, poisoned=True)
        systems = (kernel(batch, "xla", 1), *competitors(batch, n, 1))
        yield Case("lora", shape.regime, facts | {"of": "competitors"}, batch.work, systems, tolerance=TOLERANCE)


def _measured(size: Size, grid: Grid, seed: int) -> Iterator[Case]:
    steps = [(Shape(size, size.model, rows, True), n) for rows, numbers in grid.decode for n in numbers]
    steps += [(Shape(size, size.model, grid.prefill_rows, False), n) for n in grid.prefill_adapters]
    for rank, (shape, n) in itertools.product(grid.ranks, steps):
        if rank == "mixed" and n < 4:
            continue
        batch = _batch(shape, rank, n, rows=shape.rows, layers=size.reference_layers, seed=seed)
        systems = [kernel(batch, backend, size.layers) for backend in size.backends]
        systems.append(kernel(batch, "xla", size.reference_layers))
        main = rank == grid.main_rank
        if main or (n == grid.main_adapters and rank in grid.peer_ranks):
            layers = max(1, min(PEER_LAYERS, size.layers, size.cache_bytes // batch.work.bytes))
            few = _batch(shape, rank, n, rows=shape.rows, layers=layers, seed=seed)
            systems += competitors(few, grid.loop_adapters, layers)
        facts = {"model": shape.model.name, "rows": shape.rows, "adapters": n, "rank": rank}
        yield Case("lora", shape.regime, facts, batch.work, tuple(systems), importance=0 if main else 1)
        if main or n == grid.main_adapters:
            yield from _halves(batch, facts)
    rows, numbers = grid.second_decode
    for rank, n in itertools.product(grid.second_ranks, numbers):
        shape = Shape(size, size.second_model, rows, True)
        batch = _batch(shape, rank, n, rows=rows, layers=size.layers, seed=seed)
        facts = {"model": shape.model.name, "rows": rows, "adapters": n, "rank": rank}
        kernels = tuple(kernel(batch, backend, size.layers) for backend in size.backends)
        yield Case("lora", "decode", facts, batch.work, kernels, importance=2)


def _halves(batch: Batch, facts: dict[str, Any]) -> Iterator[Case]:
    """Shrink and expand alone."""
    shape, layers = batch.shape, batch.shape.size.layers
    itemsize = DTYPE.dtype.itemsize

    def hs(backend: str) -> tuple[jax.Array, ...]:
        return tuple(random_array(h.shape, batch.seed).astype(h.dtype) for h in hidden(shape, backend))

    def expand_arguments(backend: str) -> list[tuple[Any, ...]]:
        h = hs(backend)
        return [(h, *rest) for _, *rest in batch.arguments(backend, layers)]

    shrinks, expands = [], []
    for backend in shape.size.backends:
        program = shrink(shape, backend, layers)
        shrinks.append(System(backend, program, repeat(partial(batch.arguments, backend, layers)), layers))
        program = expand(shape, backend, layers)
        expands.append(System(backend, program, chain(batch.ys, partial(expand_arguments, backend)), layers))
    for op, work_of, systems in (("lora_shrink", shrink_work, shrinks), ("lora_expand", expand_work, expands)):
        work = sum((work_of(batch.ranks, batch.counts, s, itemsize) for s in shape.layout.stacks), Work())
        yield Case(op, shape.regime, facts, work, tuple(systems), importance=1)


def _batch(shape: Shape, ranks: Ranks, n: int, *, rows: int, layers: int, seed: int, poisoned: bool = False) -> Batch:
    """`rows` rows over `n` adapters, in so many sets that their layers outgrow the cache."""
    size, rng = shape.size, np.random.default_rng(seed)
    adapters = resident(
        shape.layout, ranks, slots=size.slots, max_rank=size.max_rank, pool_pages=shape.pool[0], rng=rng
    )
    counts = spread(rows, n)
    if ranks == "ragged":
        sets: tuple[np.ndarray, ...] = (adapters.by_rank(rng.permutation(size.slots)[:n]),)
    else:
        of_layer = max(1, layer_work(adapters.ranks[:n], np.ones(n), shape.layout, DTYPE.dtype.itemsize).bytes)
        count = max(1, min(size.slots // n, ceil_div(size.cache_bytes, layers * of_layer)))
        sets = tuple(adapters.by_rank((r * n + np.arange(n)) % size.slots) for r in range(count))
    return Batch(shape, adapters, sets, counts, seed, poisoned)
