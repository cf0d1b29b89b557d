"""What the chip at hand reaches: the measured rates that floors are computed with."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels.bench.case import Case, Program, Section, System, chain, repeat
from pallas_kernels.bench.pools import random_array
from pallas_kernels.bench.size import Size
from pallas_kernels.roofline import Work

LAUNCHES = 64
"""Kernels in a dispatch of the launch case."""


@dataclass(frozen=True)
class Ceilings:
    """bandwidth: bytes per second, read plus written, of a device copy. matmul_flops: operations per second of a
    bfloat16 matrix product."""

    bandwidth: float
    matmul_flops: float

    @classmethod
    def of(cls, rows: list[dict[str, Any]]) -> Ceilings | None:
        """From the results so far; None where they lack one."""
        best: dict[str, float] = {}
        for row in rows:
            if row["op"] == "ceiling" and "seconds" in row:
                rate = max(row["bytes"], row["flops"]) / row["seconds"]
                best[row["regime"]] = max(best.get(row["regime"], 0.0), rate)
        return cls(best["copy"], best["matmul"]) if best.keys() >= {"copy", "matmul"} else None


def section(size: Size, seed: int) -> Section:
    """The cases: `copy` and `matmul` are the ceilings; `read` and `launch` help to read the other results."""
    elements, width = size.copy_bytes // 2, size.matmul_width
    vector = jax.ShapeDtypeStruct((elements,), jnp.bfloat16)
    square = jax.ShapeDtypeStruct((width, width), jnp.bfloat16)
    small = jax.ShapeDtypeStruct((128,), jnp.float32)

    def launches(x: jax.Array) -> jax.Array:
        for _ in range(LAUNCHES):
            x = lax.optimization_barrier(-x)
        return x

    def product(a: jax.Array, b: jax.Array) -> jax.Array:
        return jnp.dot(a, b, preferred_element_type=jnp.float32).astype(a.dtype)

    def arguments() -> list[tuple[Any, ...]]:
        return [(random_array((elements,), seed),)]

    def squares() -> list[tuple[Any, ...]]:
        return [(random_array((width, width), seed, scale=width**-0.5),)]  # so that powers neither grow nor vanish

    def system(name: str, function: Callable[..., Any], struct: Any) -> System:
        return System(name, _program(name, function, struct), repeat(arguments))

    matmul = System(
        "xla", _program("matmul", product, square, square), chain(partial(random_array, (width, width), seed), squares)
    )
    launch = System("xla", _program("launch", launches, small), chain(partial(jnp.ones, 128), lambda: [()]), LAUNCHES)
    moved = Work(bytes=2 * 2 * elements)
    cases: Mapping[str, tuple[Work, tuple[System, ...]]] = {
        "copy": (moved, (system("copy", jnp.copy, vector), system("negate", jnp.negative, vector))),
        "matmul": (Work(bytes=3 * 2 * width**2, flops=2 * width**3), (matmul,)),
        "read": (Work(bytes=2 * elements), (system("sum", partial(jnp.sum, dtype=jnp.float32), vector),)),
        "launch": (Work(bytes=2 * 4 * 128), (launch,)),
    }
    facts: dict[str, dict[str, Any]] = {"copy": {"bytes": size.copy_bytes}, "matmul": {"width": width}}
    return Section(
        "ceilings",
        [Case("ceiling", name, facts.get(name, {}), *case, importance=-1) for name, case in cases.items()],
    )


def _program(name: str, function: Callable[..., Any], *structs: jax.ShapeDtypeStruct) -> Program:
    return Program(f"ceiling-{name}", jax.jit(function, donate_argnums=0 if name == "launch" else ()), lambda: structs)
