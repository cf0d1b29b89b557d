"""The programs of the LoRA cases: every stack of every layer in sequence, as in a step."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from functools import cache, partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels.bench import peers
from pallas_kernels.bench.case import Program
from pallas_kernels.bench.lora_batch import DTYPE, Shape
from pallas_kernels.lora import AdapterTable, LoraProduct, LoraTiles
from pallas_kernels.lora.api import LoraOptions, kernel_work, lora_expand, lora_shrink


@cache
def product(shape: Shape, backend: str, layers: int) -> Program:
    """`(ys, xs, pools, table, tiles) -> ys`: the whole product."""

    def run(ys: Any, xs: Any, pools: Any, table: AdapterTable, tiles: LoraTiles) -> Any:
        size, stacks = shape.size, shape.layout.stacks
        lora = LoraProduct(
            shape.layout, table, tiles, dtype=DTYPE, decode=shape.decode, tile_rows=shape.tile_rows(backend),
            max_rank=size.max_rank, implementation=backend, interpret=size.miniature and backend != "xla",  # type: ignore[arg-type]
        )  # fmt: skip
        return _in_sequence(pools, xs, ys, lambda pool, i, x, y: lora(x, y, pool, stacks[i]))

    return _program(shape, "lora", (backend, layers), run, partial(shape.structs, backend, layers))


@cache
def shrink(shape: Shape, backend: str, layers: int) -> Program:
    """`(xs, pools, table, tiles) -> h` of every layer and stack."""

    def run(xs: Any, pools: Any, table: AdapterTable, tiles: LoraTiles) -> Any:
        options, hs = _options(shape, backend), []
        work = kernel_work(shape.layout, table.ranks[tiles.slot], tiles, options)
        for pool, (i, stack) in itertools.product(pools, enumerate(shape.layout.stacks)):
            h = lora_shrink(xs[i], pool, table.pages, work, shape.layout, stack, options)
            xs, h = lax.optimization_barrier((xs, h))
            hs.append(h)
        return tuple(hs)

    structs = partial(shape.structs, backend, layers)
    return _program(shape, "lora_shrink", (backend, layers), run, lambda: structs()[1:], donate=())


@cache
def expand(shape: Shape, backend: str, layers: int) -> Program:
    """`(ys, hs, pools, table, tiles) -> ys`: every layer reads the same h `[slices, T, ...]`."""

    def run(ys: Any, hs: Any, pools: Any, table: AdapterTable, tiles: LoraTiles) -> Any:
        options = _options(shape, backend)
        work = kernel_work(shape.layout, table.ranks[tiles.slot], tiles, options)

        def call(pool: Any, i: int, h: Any, y: Any) -> Any:
            return lora_expand(h, y, pool, table.pages, work, shape.layout, shape.layout.stacks[i], options)

        return _in_sequence(pools, hs, ys, call)

    def shapes() -> tuple[Any, ...]:
        ys, _, *rest = shape.structs(backend, layers)
        return ys, hidden(shape, backend), *rest

    return _program(shape, "lora_expand", (backend, layers), run, shapes)


def hidden(shape: Shape, backend: str) -> tuple[jax.ShapeDtypeStruct, ...]:
    """Shapes of shrink's results for each stack."""
    one = shrink(shape, backend, 1)
    return jax.eval_shape(one.function, *one.shapes())


@cache
def ragged_dot(shape: Shape, n: int, rank: int, layers: int) -> Program:
    """`(ys, xs, weights of every layer, counts [n]) -> ys` by `jax.lax.ragged_dot`."""

    def run(ys: Any, xs: Any, weights: Any, counts: jax.Array) -> Any:
        return _in_sequence(weights, xs, ys, lambda layer, i, x, y: peers.add_ragged_dot(x, y, layer[i], counts))

    def shapes() -> tuple[Any, ...]:
        weights = peers.weights_struct(shape.layout, n, rank)
        return *shape.structs("xla", layers)[:2], (weights,) * layers, jax.ShapeDtypeStruct((n,), jnp.int32)

    return _program(shape, "lora", ("ragged_dot", n, rank, layers), run, shapes)


@cache
def loop(shape: Shape, counts: tuple[int, ...], rank: int, layers: int) -> Program:
    """`(ys, xs, weights of every layer, stack and adapter) -> ys`, one adapter at a time, unrolled."""

    def run(ys: Any, xs: Any, weights: Any) -> Any:
        return _in_sequence(weights, xs, ys, lambda layer, i, x, y: peers.add_one_by_one(x, y, layer[i], counts))

    def shapes() -> tuple[Any, ...]:
        weights = jax.eval_shape(peers.one_by_one, peers.weights_struct(shape.layout, len(counts), rank))
        return *shape.structs("xla", layers)[:2], (weights,) * layers

    return _program(shape, "lora", ("loop", sum(counts), len(counts), rank, layers), run, shapes)


def _in_sequence(layers: Sequence[Any], xs: Any, ys: Any, call: Callable[[Any, int, Any, Any], Any]) -> Any:
    """Sets `ys[i] = call(layer, i, xs[i], ys[i])` for every stack of every layer, one after another."""
    ys = list(ys)
    for layer, i in itertools.product(layers, range(len(ys))):
        ys[i] = call(layer, i, xs[i], ys[i])
        xs, ys[i] = lax.optimization_barrier((xs, ys[i]))  # the next call waits for this one
    return tuple(ys)


def _options(shape: Shape, backend: str) -> LoraOptions:
    return LoraOptions(shape.decode, shape.tile_rows(backend), shape.size.max_rank, backend, shape.size.miniature)


def _program(
    shape: Shape, op: str, facts: tuple[Any, ...], run: Any, shapes: Callable[[], tuple[Any, ...]], donate: Any = 0
) -> Program:
    name = "-".join(map(str, (op, shape.model.name, shape.regime, shape.rows, *facts)))
    return Program(name, jax.jit(run, donate_argnums=donate), shapes)
