"""Cases of layers of experts: Qwen3-30B-A3B's, in decode steps and prompts."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.bench.case import Case, Program, System, repeat
from pallas_kernels.bench.pools import random_array
from pallas_kernels.bench.size import Size
from pallas_kernels.experts import expert_outputs
from pallas_kernels.experts.roofline import expert_work

DTYPE = jnp.bfloat16
TOLERANCE = 1e-2
PROMPT_TOKENS = 1024
"""Least tokens of a case of prompts."""


@dataclass(frozen=True)
class Grid:
    """A model's experts, the layers of a dispatch, and the tokens of a step. check_tokens: of the check, whose unused
    experts are NaN."""

    name: str
    experts: int
    per_token: int
    hidden: int
    ffn: int
    layers: int
    tokens: tuple[int, ...]
    check_tokens: int


FULL = Grid("qwen3-30b-a3b", 128, 8, 2048, 768, layers=4, tokens=(1, 8, 64, 256, 1024, 8192), check_tokens=5)
MINIATURE = Grid("tiny", 8, 2, 32, 16, layers=1, tokens=(4,), check_tokens=3)


def section(size: Size, seed: int) -> list[Case]:
    """Every case."""
    return list(_cases(size, MINIATURE if size.miniature else FULL, seed))


def _cases(size: Size, grid: Grid, seed: int) -> Iterator[Case]:
    for tokens in (grid.check_tokens, *grid.tokens):
        is_check = tokens == grid.check_tokens
        rng = np.random.default_rng(seed)
        choice = np.stack([rng.permutation(grid.experts)[: grid.per_token] for _ in range(tokens)]).astype(np.int32)
        used = np.unique(choice)
        work = expert_work(tokens, grid.per_token, len(used), grid.hidden, grid.ffn, DTYPE.dtype.itemsize)
        unused = np.setdiff1d(np.arange(grid.experts), used) if is_check else used[:0]
        layers = 1 if is_check else grid.layers
        systems = [_system(name, size, grid, layers, choice, unused, seed) for name in ("xla", "triton")]
        facts = {"model": grid.name, "tokens": tokens}
        regime = "prefill" if tokens >= PROMPT_TOKENS else "decode"
        if is_check:
            yield Case("experts", regime, facts, work, tuple(systems), tolerance=TOLERANCE)
        else:
            yield Case("experts", regime, facts, work, tuple(reversed(systems)), importance=1)


def _system(
    name: Any, size: Size, grid: Grid, layers: int, choice: np.ndarray, unused: np.ndarray, seed: int
) -> System:
    """Layers that follow one another, with the same choice and their own weights."""
    shapes = (grid.experts, grid.hidden, 2 * grid.ffn), (grid.experts, grid.ffn, grid.hidden)

    def run(x: jax.Array, choice: jax.Array, shares: jax.Array, weights: Any) -> jax.Array:
        for gate_up, down in weights:
            x = expert_outputs(
                x, choice, shares, gate_up, down,
                activation="silu", implementation=name, interpret=size.miniature,
            )  # fmt: skip
        return x

    def structs() -> tuple[Any, ...]:
        x = jax.ShapeDtypeStruct((len(choice), grid.hidden), DTYPE)
        layer = [jax.ShapeDtypeStruct(shape, DTYPE) for shape in shapes]
        ids, shares = (jax.ShapeDtypeStruct(choice.shape, dtype) for dtype in (jnp.int32, jnp.float32))
        return x, ids, shares, [layer] * layers

    def arguments() -> list[tuple[Any, ...]]:
        weights = [
            [
                random_array(shape, seed + 2 * layer + i, scale=shape[1] ** -0.5).at[unused].set(jnp.nan)
                for i, shape in enumerate(shapes)
            ]
            for layer in range(layers)
        ]
        shares = jnp.full(choice.shape, 1.0 / grid.per_token, jnp.float32)
        return [(random_array((len(choice), grid.hidden), seed + 100), jnp.asarray(choice), shares, weights)]

    program = Program(f"experts-{grid.name}-{len(choice)}-{name}-{layers}", jax.jit(run), structs)
    return System(name, program, repeat(arguments), repeats=layers)
