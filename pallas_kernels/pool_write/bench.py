"""Cases of writes into the pool: keys and values of a step, and pages of an adapter's upload."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.bench.case import Case, Program, System, chain
from pallas_kernels.bench.pools import random_array, random_pages
from pallas_kernels.bench.size import Size
from pallas_kernels.pool_write import write_kv, write_pages
from pallas_kernels.pool_write.roofline import write_kv_work, write_pages_work

DTYPE = jnp.bfloat16


@dataclass(frozen=True)
class Grid:
    """tokens, pages: of one write. pool_pages: of each layer's pool."""

    tokens: tuple[int, ...]
    pages: tuple[int, ...]
    pool_pages: int


FULL = Grid(tokens=(1, 64, 256, 4096), pages=(4, 32), pool_pages=4096)
MINIATURE = Grid(tokens=(4,), pages=(2,), pool_pages=16)


def section(size: Size, seed: int) -> list[Case]:
    """Every case."""
    grid = MINIATURE if size.miniature else FULL
    return [*_write_kv(size, grid, seed), *_write_pages(size, grid, seed)]


def _write_kv(size: Size, grid: Grid, seed: int) -> Iterator[Case]:
    width, itemsize = size.model.width, DTYPE.dtype.itemsize

    def expected(pool: np.ndarray, k: Any, v: Any, page: Any, offset: Any) -> None:
        pool[page, 0, offset], pool[page, 1, offset] = k, v

    for tokens in grid.tokens:
        work = write_kv_work(tokens, width, itemsize)
        rng = np.random.default_rng(seed)
        place = rng.choice((grid.pool_pages - 1) * size.page_size, tokens, replace=False) + size.page_size
        page, offset = (a.astype(np.int32) for a in divmod(place, size.page_size))

        def arguments(tokens: int = tokens, page: Any = page, offset: Any = offset) -> tuple[Any, ...]:
            k, v = (random_array((tokens, width), seed + i) for i in (1, 2))
            return k, v, jnp.asarray(page), jnp.asarray(offset)

        yield from _cases(size, grid, "write_kv", {"tokens": tokens}, work, write_kv, arguments, expected, seed)


def _write_pages(size: Size, grid: Grid, seed: int) -> Iterator[Case]:
    width, itemsize = size.model.width, DTYPE.dtype.itemsize

    def expected(pool: np.ndarray, page: Any, contents: Any) -> None:
        pool[page] = contents

    for pages in grid.pages:
        work = write_pages_work(pages, size.page_size, width, itemsize)

        def arguments(pages: int = pages) -> tuple[Any, ...]:
            ids = random_pages(pages, grid.pool_pages, np.random.default_rng(seed))
            return jnp.asarray(ids), random_array((pages, 2, size.page_size, width), seed + 1)

        yield from _cases(size, grid, "write_pages", {"pages": pages}, work, write_pages, arguments, expected, seed)


def _cases(
    size: Size, grid: Grid, op: str, facts: Any, work: Any, write: Any, arguments: Any, expected: Any, seed: int
) -> Iterator[Case]:
    """The check of a write against NumPy, and its measurement."""
    shape = (grid.pool_pages, 2, size.page_size, size.model.width)

    def pools(layers: int) -> tuple[jax.Array, ...]:
        return tuple(random_array(shape, seed + 10 + layer) for layer in range(layers))

    def run(pools: Any, *arguments: jax.Array) -> Any:
        return tuple(write(pool, *arguments) for pool in pools)

    def shapes(layers: int) -> tuple[Any, ...]:
        pool = jax.ShapeDtypeStruct(shape, DTYPE)
        return (pool,) * layers, *jax.eval_shape(arguments)

    def system(layers: int) -> System:
        program = Program(
            f"{op}-{'-'.join(map(str, facts.values()))}-{layers}",
            jax.jit(run, donate_argnums=0),
            partial(shapes, layers),
        )
        return System("xla", program, chain(partial(pools, layers), lambda: [arguments()]), repeats=layers)

    def by_numpy(_: Any) -> Callable[[], Any]:
        pool = np.array(pools(1)[0])
        expected(pool, *map(np.asarray, arguments()))
        return lambda: (pool,)

    yield Case(op, "write", facts, work, (System("numpy", start=by_numpy), system(1)), tolerance=0.0)
    facts = {"model": size.model.name, **facts}
    yield Case(op, "write", facts, work, (system(size.layers),), importance=1)
