"""The measured rates of this device, from which floors are computed."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels.bench.case import Case, Program, System, chain, repeat
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
        """The best rates in the results; None if one is missing."""
        best: dict[str, float] = {}
        for row in rows:
            if row["op"] == "ceiling" and "seconds" in row:
                rate = max(row["bytes"], row["flops"]) / row["seconds"]
                best[row["regime"]] = max(best.get(row["regime"], 0.0), rate)
        return cls(best["copy"], best["matmul"]) if best.keys() >= {"copy", "matmul"} else None


def section(size: Size, seed: int) -> list[Case]:
    """`copy` and `matmul` are the ceilings; `read` and `launch` help to interpret the other results."""
    elements, width = size.copy_bytes // 2, size.matmul_width

    def program(name: str, function: Any, *shapes: tuple[int, ...], dtype: Any = jnp.bfloat16) -> Program:
        structs = tuple(jax.ShapeDtypeStruct(shape, dtype) for shape in shapes)
        return Program(
            f"ceiling-{name}", jax.jit(function, donate_argnums=0 if name == "launch" else ()), lambda: structs
        )

    def over_vector(name: str, function: Any) -> System:
        vector = partial(random_array, (elements,), seed)
        return System(name, program(name, function, (elements,)), repeat(lambda: [(vector(),)]))

    def launches(x: jax.Array) -> jax.Array:
        for _ in range(LAUNCHES):
            x = lax.optimization_barrier(-x)
        return x

    def product(a: jax.Array, b: jax.Array) -> jax.Array:
        return jnp.dot(a, b, preferred_element_type=jnp.float32).astype(a.dtype)

    square = partial(random_array, (width, width), seed)
    factors = chain(square, lambda: [(square(scale=width**-0.5),)])  # powers neither grow nor vanish
    matmul = System("xla", program("matmul", product, *[(width, width)] * 2), factors)
    small = program("launch", launches, (128,), dtype=jnp.float32)
    launch = System("xla", small, chain(partial(jnp.ones, 128), lambda: [()]), LAUNCHES)
    copies = over_vector("copy", jnp.copy), over_vector("negate", jnp.negative)
    read = over_vector("sum", partial(jnp.sum, dtype=jnp.float32))
    cases: tuple[tuple[str, dict[str, Any], Work, tuple[System, ...]], ...] = (
        ("copy", {"bytes": size.copy_bytes}, Work(bytes=2 * 2 * elements), copies),
        ("matmul", {"width": width}, Work(bytes=3 * 2 * width**2, flops=2 * width**3), (matmul,)),
        ("read", {}, Work(bytes=2 * elements), (read,)),
        ("launch", {}, Work(bytes=2 * 4 * 128), (launch,)),
    )
    return [Case("ceiling", *case) for case in cases]
