"""The programs of the LoRA cases: every stack of every layer, one after another, as in a step."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from functools import cache
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels.bench import peers
from pallas_kernels.bench.case import Program
from pallas_kernels.bench.lora_batch import DTYPE, Shape
from pallas_kernels.lora import AdapterTable, LoraProduct, LoraTiles
from pallas_kernels.lora.api import LoraOptions, lora_expand, lora_shrink
from pallas_kernels.lora.work import stack_work


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
    return stack_work(shape.layout, table.ranks, tiles)


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
