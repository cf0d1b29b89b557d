"""Cases of the LoRA products: the whole product of a layer, shrink and expand alone, and the baselines."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import jax.numpy as jnp

from pallas_kernels.bench import lora_programs as programs
from pallas_kernels.bench import peers
from pallas_kernels.bench.adapters import Ranks
from pallas_kernels.bench.case import Case, System, chain, repeat
from pallas_kernels.bench.lora_batch import DTYPE, Batch, Shape, make_batch
from pallas_kernels.bench.pools import random_array
from pallas_kernels.bench.size import Size
from pallas_kernels.lora.roofline import expand_work, shrink_work
from pallas_kernels.roofline import Work

KERNEL = "triton"
"""The measured implementation."""
TOLERANCE = 1e-2
"""Of checks: bfloat16's error, far below that of one wrong row."""
PEER_LAYERS = 8
"""Most layers of a baseline's dispatch."""


@dataclass(frozen=True)
class Grid:
    """The measured shapes.

    Attributes:
      decode: rows of a step, and numbers of adapters that they are spread over.
      prefill_rows, prefill_adapters: the same for steps with prefill.
      ranks: the product is measured at all ranks and numbers of adapters.
      main_rank: baselines and halves are measured at this rank with all numbers of adapters.
      main_adapters: and at `peer_ranks` with this number.
      loop_adapters: most adapters of the unrolled loop beside the other systems.
      late_loop_adapters: most adapters of the loop in a case of its own, measured last.
      second_decode, second_ranks: the same for the second model.
      check_adapters: adapters of the checks.
    """

    decode: tuple[tuple[int, tuple[int, ...]], ...]
    prefill_rows: int
    prefill_adapters: tuple[int, ...]
    ranks: tuple[Ranks, ...]
    main_rank: int
    main_adapters: int
    peer_ranks: tuple[Ranks, ...]
    loop_adapters: int
    late_loop_adapters: int
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
    loop_adapters=16,
    late_loop_adapters=64,
    second_decode=(64, (16, 64)),
    second_ranks=(16, "mixed"),
    check_adapters=16,
)
MINIATURE = Grid(
    decode=((4, (1, 4)),),
    prefill_rows=16,
    prefill_adapters=(2,),
    ranks=(8,),
    main_rank=8,
    main_adapters=4,
    peer_ranks=(8,),
    loop_adapters=1,
    late_loop_adapters=2,
    second_decode=(4, (2,)),
    second_ranks=(),
    check_adapters=2,
)


def kernel(batch: Batch, backend: str, layers: int) -> System:
    """A backend's whole product."""
    return System(
        backend,
        programs.product(batch.shape, backend, layers),
        chain(batch.ys, lambda: batch.arguments(backend, layers)),
        repeats=layers,
    )


def ragged_dot(batch: Batch, layers: int) -> System:
    """`jax.lax.ragged_dot`."""
    shape, n, rank = batch.shape, len(batch.counts), int(batch.ranks.max())

    def arguments() -> list[tuple[Any, ...]]:
        xs, counts = batch.xs(), jnp.asarray(batch.counts, jnp.int32)
        return [(xs, weights, counts) for weights in _contiguous(batch, layers)]

    return System("ragged_dot", programs.ragged_dot(shape, n, rank, layers), chain(batch.ys, arguments), repeats=layers)


def loop(batch: Batch, layers: int) -> System:
    """The loop over the adapters."""
    counts, rank = tuple(batch.counts.tolist()), int(batch.ranks.max())

    def arguments() -> list[tuple[Any, ...]]:
        xs = batch.xs()
        return [(xs, tuple(map(peers.one_by_one, weights))) for weights in _contiguous(batch, layers)]

    return System("loop", programs.loop(batch.shape, counts, rank, layers), chain(batch.ys, arguments), repeats=layers)


def _contiguous(batch: Batch, layers: int) -> list[tuple[Any, ...]]:
    """The baselines' matrices of every layer, for each set of adapters."""
    table, pools, rank = batch.adapters.table(), batch.pools(layers), int(batch.ranks.max())
    return [
        tuple(peers.contiguous(pool, table, jnp.asarray(slots), batch.shape.layout, rank) for pool in pools)
        for slots in batch.sets
    ]


def section(size: Size, seed: int) -> list[Case]:
    """Every case."""
    grid = MINIATURE if size.miniature else FULL
    return [*checks(size, grid, seed), *_measured(size, grid, seed)]


def checks(size: Size, grid: Grid, seed: int) -> Iterator[Case]:
    """Checks of kernels and baselines at timed shapes, in one layer whose other pages are NaN, with adapters of any
    ranks; the kernels also with rows without an adapter."""
    for number, (count, decode) in enumerate(((grid.decode[0][0], True), (grid.prefill_rows, False))):
        shape, n = Shape(size, size.model, count, decode), min(grid.check_adapters, count // 2)
        batch = make_batch(shape, "ragged", n, rows=count - count // 4, layers=1, seed=seed + 7 * number, poisoned=True)
        systems = tuple(kernel(batch, backend, 1) for backend in ("xla", KERNEL))
        facts = {"rows": count, "adapters": n, "rank": "ragged"}
        yield Case("lora", shape.regime, facts, batch.work, systems, tolerance=TOLERANCE)
        batch = make_batch(shape, "ragged", n, rows=count, layers=1, seed=seed + 7 * number, poisoned=True)
        systems = (kernel(batch, "xla", 1), ragged_dot(batch, 1), loop(batch, 1))
        yield Case("lora", shape.regime, facts | {"of": "competitors"}, batch.work, systems, tolerance=TOLERANCE)


def _measured(size: Size, grid: Grid, seed: int) -> Iterator[Case]:
    steps = [(Shape(size, size.model, rows, True), n) for rows, numbers in grid.decode for n in numbers]
    steps += [(Shape(size, size.model, grid.prefill_rows, False), n) for n in grid.prefill_adapters]
    for rank, (shape, n) in itertools.product(grid.ranks, steps):
        if rank == "mixed" and n < 4:
            continue
        batch = make_batch(shape, rank, n, rows=shape.rows, layers=1, seed=seed)
        systems = [kernel(batch, KERNEL, size.layers), kernel(batch, "xla", 1)]
        facts = {"model": shape.model.name, "rows": shape.rows, "adapters": n, "rank": rank}
        main = rank == grid.main_rank
        if main or (n == grid.main_adapters and rank in grid.peer_ranks):
            layers = max(1, min(PEER_LAYERS, size.layers, size.cache_bytes // batch.work.bytes))
            few = make_batch(shape, rank, n, rows=shape.rows, layers=layers, seed=seed)
            systems.append(ragged_dot(few, layers))
            if n <= grid.loop_adapters:
                systems.append(loop(few, layers))
            else:
                yield Case("lora", shape.regime, facts | {"alone": "loop"}, few.work, (_late_loop(few, grid),), 2)
        yield Case("lora", shape.regime, facts, batch.work, tuple(systems), importance=0 if main else 1)
        if main or n == grid.main_adapters:
            yield from _halves(batch, facts)
    rows, numbers = grid.second_decode
    for rank, n in itertools.product(grid.second_ranks, numbers):
        shape = Shape(size, size.second_model, rows, True)
        batch = make_batch(shape, rank, n, rows=rows, layers=size.layers, seed=seed)
        facts = {"model": shape.model.name, "rows": rows, "adapters": n, "rank": rank}
        systems = [kernel(batch, KERNEL, size.layers)]
        yield Case("lora", "decode", facts, batch.work, tuple(systems), importance=2)


def _late_loop(batch: Batch, grid: Grid) -> System:
    """The loop over many adapters, in a case of its own because it compiles long."""
    if len(batch.counts) > grid.late_loop_adapters:
        return System("loop", skip=f"unrolled over {len(batch.counts)} adapters it compiles for minutes")
    return loop(batch, 1)


def _halves(batch: Batch, facts: dict[str, Any]) -> Iterator[Case]:
    """Shrink and expand alone."""
    shape, layers = batch.shape, batch.shape.size.layers
    itemsize = DTYPE.dtype.itemsize

    def arguments() -> list[tuple[Any, ...]]:
        return batch.arguments(KERNEL, layers)

    def expand_arguments() -> list[tuple[Any, ...]]:
        h = tuple(random_array(h.shape, batch.seed).astype(h.dtype) for h in programs.hidden(shape, KERNEL))
        return [(h, *rest) for _, *rest in arguments()]

    shrink = System(KERNEL, programs.shrink(shape, KERNEL, layers), repeat(arguments), layers)
    expand = System(KERNEL, programs.expand(shape, KERNEL, layers), chain(batch.ys, expand_arguments), layers)
    for op, work_of, system in (("lora_shrink", shrink_work, shrink), ("lora_expand", expand_work, expand)):
        work = sum((work_of(batch.ranks, batch.counts, s, itemsize) for s in shape.layout.stacks), Work())
        yield Case(op, shape.regime, facts, work, (system,), importance=1)
