"""Baselines of the LoRA kernels: `jax.lax.ragged_dot`, and a loop over the adapters.

Both read each adapter's matrices contiguous and padded to the largest rank, gathered from the pool before the timed
part. That favours them: a server would gather whenever a step's adapters change, or keep every adapter padded.
"""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from pallas_kernels.lora import AdapterTable, LoraLayout, Stack, xla
from pallas_kernels.lora.layout import ceil_div

Weights = tuple[jax.Array, tuple[jax.Array, ...]]
"""A `[n, d_in, projections * rank]` of a stack, and B `[n, rank, d_out]` of each of its projections."""


@partial(jax.jit, static_argnums=(3, 4))
def contiguous(
    pool: jax.Array, table: AdapterTable, slots: jax.Array, layout: LoraLayout, rank: int
) -> tuple[Weights, ...]:
    """Returns the matrices of `slots [n]` in one layer, for each stack, zero past an adapter's rank."""
    n, flat = slots.shape[0], pool.reshape(-1, layout.width)
    stacks = xla.prepare(layout, table.pages, table.ranks, slots, jnp.int32(n), rank)

    def of_stack(stack: Stack, rows: xla.StackRows) -> Weights:
        projections = len(stack.projections)
        ranks = table.ranks[slots][:, jnp.array(stack.rank_index)]  # [n, p]
        live = jnp.arange(rank) < ranks[..., None]  # [n, p, rank]
        a = jnp.moveaxis(flat[rows.a_row], 0, 2)  # [n, p, groups, GROUP, chunks, W]
        a = a.reshape(n, projections, -1, layout.a_chunks(stack) * layout.width)[:, :, :rank, : stack.d_in]
        a = jnp.where(live[..., None], a, 0).reshape(n, projections * rank, stack.d_in)
        b = jnp.where(rows.b_live[..., None], flat[rows.b_row], 0)  # [groups, n, B chunks, GROUP, W]
        b = jnp.moveaxis(b, (0, 3), (1, 2))  # [n, groups, GROUP, B chunks, W]
        b = b.reshape(n, -1, b.shape[3] * layout.width)[:, :rank]
        first = np.cumsum([0] + [ceil_div(d, layout.width) * layout.width for d in stack.d_outs])
        return a.swapaxes(1, 2), tuple(b[:, :, at : at + d] for at, d in zip(first[:-1], stack.d_outs, strict=True))

    return tuple(of_stack(stack, rows) for stack, rows in zip(layout.stacks, stacks, strict=True))


def weights_struct(layout: LoraLayout, n: int, rank: int) -> tuple[Weights, ...]:
    """Shapes of the result of `contiguous`."""

    def struct(*shape: int) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, jnp.bfloat16)

    return tuple(
        (struct(n, s.d_in, len(s.projections) * rank), tuple(struct(n, rank, d) for d in s.d_outs))  # type: ignore[misc]
        for s in layout.stacks
    )


def add_ragged_dot(x: jax.Array, y: jax.Array, weights: Weights, counts: jax.Array) -> jax.Array:
    """Returns `y + x A B` of rows sorted by adapter, `counts [n]` rows each."""
    a, b = weights
    rank = b[0].shape[1]
    h = lax.ragged_dot(x, a, counts, preferred_element_type=jnp.float32).astype(x.dtype)
    parts = [
        lax.ragged_dot(h[:, p * rank : (p + 1) * rank], b_p, counts, preferred_element_type=jnp.float32)
        for p, b_p in enumerate(b)
    ]
    return (y + jnp.concatenate(parts, axis=1)).astype(y.dtype)


def one_by_one(weights: tuple[Weights, ...]) -> tuple[tuple[Weights, ...], ...]:
    """Splits the matrices into one array per adapter, for each stack."""
    n = weights[0][0].shape[0]
    return tuple(tuple(jax.tree.map(lambda w, i=i: w[i], stack) for i in range(n)) for stack in weights)


def add_one_by_one(x: jax.Array, y: jax.Array, weights: tuple[Weights, ...], counts: tuple[int, ...]) -> jax.Array:
    """Returns the same, one adapter at a time. weights: one stack's, for each adapter. `counts` are static."""
    dot = partial(jnp.dot, preferred_element_type=jnp.float32)
    parts, row = [], 0
    for (a, b), count in zip(weights, counts, strict=True):
        rank = b[0].shape[0]
        h = dot(x[row : row + count], a).astype(x.dtype)
        parts.append(jnp.concatenate([dot(h[:, p * rank :][:, :rank], b_p) for p, b_p in enumerate(b)], axis=1))
        row += count
    return (y + jnp.concatenate(parts)).astype(y.dtype)
