"""LoRA over shards, with the paper's collectives (section 6). Called inside `shard_map`."""

from __future__ import annotations

import jax
from jax import lax

from pallas_kernels.lora import LoraProduct
from pallas_kernels.lora.layout import Stack
from slora_jax.models.projections import ROW_PARALLEL
from slora_jax.parallel.layout import Shards
from slora_jax.parallel.mesh import AXIS


def add_lora(lora: LoraProduct, shards: Shards, x: jax.Array, y: jax.Array, pool: jax.Array, stack: Stack) -> jax.Array:
    """Adds a stack's LoRA product to a shard's base product `y` and returns the sum.

    For o and down, `y` is a partial sum. LoRA adds only to the shard's own columns of it, so the base's all-reduce,
    which the caller does afterwards, completes both.

    Args:
      x: `[T, d]` on every shard; for o and down, the shard's columns.
      y: the shard's columns; for o and down, a partial sum `[T, d]`.
      pool: one layer of the pool.
    """
    if shards.lora == "sharded_in" and stack.name not in ROW_PARALLEL:
        x = lax.dynamic_slice_in_dim(x, lax.axis_index(AXIS) * stack.d_in, stack.d_in, axis=1)
    h = _exchange(lora.shrink(x, pool, stack), shards, stack)  # [T, projections, max_rank]
    if stack.d_out == y.shape[1]:
        return lora.expand(h, y, pool, stack)
    first = lax.axis_index(AXIS) * stack.d_out
    own = lora.expand(h, lax.dynamic_slice_in_dim(y, first, stack.d_out, axis=1), pool, stack)
    return lax.dynamic_update_slice_in_dim(y, own, first, axis=1)


def _exchange(h: jax.Array, shards: Shards, stack: Stack) -> jax.Array:
    """Combines the shards' `x A` into `[T, projections, ranks]`, with at most one collective per stack."""
    if stack.rank_shards > 1:
        with jax.named_scope("all_gather_lora"):
            gathered = lax.all_gather(h, AXIS, axis=3)  # [T, projections, ranks / N, N], rank j at (j // N, j % N)
        return gathered.reshape(*h.shape[:2], -1)
    if shards.lora == "replicated":
        return h
    with jax.named_scope("all_reduce_lora"):
        return lax.psum(h, AXIS)
