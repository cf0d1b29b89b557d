"""The attention of a step with prefill by the Mosaic GPU kernel, and the shapes that it supports."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels import devices
from pallas_kernels.kv_format import LayerPool, pages_of
from pallas_kernels.paged_attention.mosaic_gpu.mixed import attend_mixed
from pallas_kernels.paged_attention.mosaic_gpu.work import CONSUMERS, block_rows, mixed_work
from pallas_kernels.paged_attention.plan import AttentionShape, MosaicGpuPlan, mosaic_gpu_plan
from pallas_kernels.paged_attention.tiles import AttentionTiles


class Attention:
    """The Mosaic GPU implementation of `PagedAttention`, for one step. It builds the work list once for all layers.

    Args:
      tile_rows: ignored; blocks have `work.block_rows` rows.
      plan: None: the plan table's.
      interpret: run by Pallas' GPU interpreter, with race detection.

    Raises:
      NotImplementedError: a decode step, or TMA with its swizzle or the tensor core does not support the shape.
    """

    def __init__(
        self,
        tiles: AttentionTiles,
        shape: AttentionShape,
        tile_rows: int = 0,
        *,
        plan: MosaicGpuPlan | None = None,
        interpret: bool = False,
    ) -> None:
        self._shape = shape
        self._interpret = plgpu.InterpretGPUParams(detect_races=True) if interpret else None
        self._plan = mosaic_gpu_plan(shape) if plan is None else plan
        _check(shape, self._plan)
        self._pages = tiles.page_table
        self._work = mixed_work(tiles, shape)

    def __call__(self, q: jax.Array, pool: LayerPool) -> jax.Array:
        """See `PagedAttention.__call__`."""
        shape, pool = self._shape, pages_of(pool)
        if q.dtype != pool.dtype:
            raise NotImplementedError(f"mosaic_gpu attention: q is {q.dtype}, the pool {pool.dtype}; they must be one")
        if q.shape[0] > shape.max_rows:
            raise ValueError(f"mosaic_gpu attention: {q.shape[0]} rows, but the tiles are for {shape.max_rows}")
        attend = attend_mixed if self._interpret else _attend_compiled
        tokens = pool.reshape(-1, shape.width)  # TMA addresses rows: a page's keys, then its values
        return attend(q, tokens, self._pages, self._work, shape, self._plan, self._interpret)


_attend_compiled = jax.jit(attend_mixed, static_argnums=(4, 5, 6))
"""`attend_mixed` as a separate function of the program, so that all layers share one trace and compilation.

Not for the interpreter: it runs each warpgroup as a computation with callbacks. In a jitted program these wait for one
another in a pool with one thread per core, and hang if there are one or two.
"""


def _check(shape: AttentionShape, plan: MosaicGpuPlan) -> None:
    device = devices.target()
    declined = None
    if shape.decode:
        declined = "decode steps; 'triton' and 'xla' serve them"
    elif device is not None and device.compute_capability != 90:
        declined = f"{device.name}; Hopper is served"
    elif shape.kv_dtype is not None:
        declined = f"{shape.kv_dtype} keys and values; 'triton' and 'xla' serve them"
    elif shape.dtype not in (jnp.bfloat16, jnp.float16):
        declined = f"dtype {shape.dtype}; bfloat16 and float16 go through the tensor core"
    elif shape.head_dim % 64 or shape.head_dim > 128:
        declined = f"head_dim {shape.head_dim}; a swizzled tile is 64 wide, and sums past 128 would spill registers"
    elif shape.page_size % 8 or plan.block_n % shape.page_size:
        declined = f"page_size {shape.page_size}; a swizzled tile has 8 rows, and a step {plan.block_n} tokens"
    elif shape.score_cap is not None:
        declined = f"score_cap {shape.score_cap}; 'triton' and 'xla' limit scores"
    elif block_rows(shape.group) < 8:
        declined = f"{shape.group} query heads per KV head; {8 * CONSUMERS} fit a block"
    if declined:
        raise NotImplementedError(f"mosaic_gpu attention: {declined}")
