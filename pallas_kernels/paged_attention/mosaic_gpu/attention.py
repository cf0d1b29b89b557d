"""The attention of one step by the Mosaic GPU kernels: supported shapes, and the choice of the kernel."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import jax
import jax.numpy as jnp
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels import devices
from pallas_kernels.paged_attention.mosaic_gpu.decode import attend_decode
from pallas_kernels.paged_attention.mosaic_gpu.mixed import attend_mixed
from pallas_kernels.paged_attention.mosaic_gpu.work import CONSUMERS, block_rows, decode_work, mixed_work
from pallas_kernels.paged_attention.plan import AttentionShape, MosaicGpuPlan, mosaic_gpu_plan
from pallas_kernels.paged_attention.tiles import AttentionTiles


class Attention:
    """The Mosaic GPU implementation of `PagedAttention`, for one step. It builds the work list once for all layers.

    Args:
      tile_rows: ignored; blocks have `work.block_rows` rows.
      plan: None: the plan table's.
      interpret: run by Pallas' GPU interpreter, with race detection.

    Raises:
      NotImplementedError: TMA with its swizzle, or the tensor core, does not support the shape.
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
        self._work = decode_work(tiles, shape, self._plan) if shape.decode else mixed_work(tiles, shape)

    def __call__(self, q: jax.Array, pool: jax.Array) -> jax.Array:
        """See `PagedAttention.__call__`."""
        shape = self._shape
        if q.dtype != pool.dtype:
            raise NotImplementedError(f"mosaic_gpu attention: q is {q.dtype}, the pool {pool.dtype}; they must be one")
        if q.shape[0] > shape.max_rows:
            raise ValueError(f"mosaic_gpu attention: {q.shape[0]} rows, but the tiles are for {shape.max_rows}")
        attend = attend_decode if shape.decode else attend_mixed
        if self._interpret is None:
            attend = _one_kernel(attend)
        tokens = pool.reshape(-1, shape.width)  # TMA addresses rows: a page's keys, then its values
        return attend(q, tokens, self._pages, self._work, shape, self._plan, self._interpret)


@cache
def _one_kernel(attend: Callable[..., jax.Array]) -> Callable[..., jax.Array]:
    """`attend` as a separate function of the program, so that all layers share one trace and compilation.

    Not for the interpreter: it runs each warpgroup as a computation with callbacks. In a jitted program these wait for
    one another in a pool with one thread per core, and hang if there are one or two.
    """
    return jax.jit(attend, static_argnums=(4, 5, 6))


def _check(shape: AttentionShape, plan: MosaicGpuPlan) -> None:
    device = devices.target()
    declined = None
    if device is not None and device.compute_capability != 90:
        declined = f"{device.name}; Hopper is served"
    elif shape.dtype not in (jnp.bfloat16, jnp.float16):
        declined = f"dtype {shape.dtype}; bfloat16 and float16 go through the tensor core"
    elif shape.head_dim % 64 or shape.head_dim > 256:
        declined = f"head_dim {shape.head_dim}; a swizzled tile is 64 wide, and registers hold 256"
    elif shape.head_dim > 128 and not shape.decode:
        declined = f"head_dim {shape.head_dim} with prefill; the sums of 64 rows would spill registers"
    elif shape.page_size % 8 or plan.block_n % shape.page_size:
        declined = f"page_size {shape.page_size}; a swizzled tile has 8 rows, and a step {plan.block_n} tokens"
    elif block_rows(shape.group) < 8 and not shape.decode:
        declined = f"{shape.group} query heads per KV head; {8 * CONSUMERS} fit a block"
    if declined:
        raise NotImplementedError(f"mosaic_gpu attention: {declined}")
