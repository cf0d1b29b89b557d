"""Cases of the programs after a step: the search of top-k and top-p, and the draw without and after it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels.bench.case import Case, Program, System, repeat
from pallas_kernels.bench.size import Size
from pallas_kernels.cutoff import cutoff
from pallas_kernels.roofline import Work
from slora_jax.engine.sampling import SamplingInputs, greedy, sample

BATCHES = 64, 256
TEMPERATURE, TOP_K, TOP_P = 0.8, 40, 0.95


def section(size: Size, seed: int) -> list[Case]:
    """Every case."""
    return list(_cases(size, seed))


def _cases(size: Size, seed: int) -> Iterator[Case]:
    for batch in (1,) if size.miniature else BATCHES:
        facts, work = {"vocab": size.model.vocab, "batch": batch}, Work(bytes=4 * batch * size.model.vocab)
        system = partial(_system, (batch, size.model.vocab), seed)
        triton = partial(_cutoff, implementation="triton", interpret=size.miniature)
        searches = system("xla", partial(_cutoff, implementation="xla")), system("triton", triton)
        yield Case("cutoff", "decode", facts, work, searches, tolerance=1e-3)
        draws = system("temperature", partial(_draw, None)), system("top-k and top-p", partial(_draw, triton))
        yield Case("sampler", "decode", facts, work, draws, importance=1)


def _cutoff(logits: jax.Array, **options: Any) -> jax.Array:
    inputs = _inputs(logits.shape[0])
    return cutoff(logits, greedy(logits), inputs.temperature, inputs.top_k, inputs.top_p, **options)


def _draw(search: Callable[[jax.Array], jax.Array] | None, logits: jax.Array) -> jax.Array:
    limit = jnp.inf if search is None else search(logits)
    return sample(logits, greedy(logits), _inputs(logits.shape[0], limit))


def _inputs(rows: int, limit: Any = jnp.inf) -> SamplingInputs:
    return SamplingInputs(
        temperature=jnp.full(rows, TEMPERATURE),
        top_k=jnp.full(rows, TOP_K),
        top_p=jnp.full(rows, TOP_P),
        min_p=jnp.zeros(rows),
        seed=jnp.arange(rows, dtype=jnp.uint32),
        output_index=jnp.zeros(rows, jnp.int32),
        cutoff=jnp.broadcast_to(limit, rows),
    )


def _system(shape: tuple[int, int], seed: int, name: str, function: Callable[[jax.Array], jax.Array]) -> System:
    struct = jax.ShapeDtypeStruct(shape, jnp.float32)
    program = Program(f"sampler-{shape[0]}-{name.replace(' ', '-')}", jax.jit(function), lambda: (struct,))
    return System(name, program, repeat(lambda: [(4 * jax.random.normal(jax.random.key(seed), shape),)]))
