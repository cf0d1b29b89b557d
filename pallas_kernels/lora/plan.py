"""Block shapes of the LoRA kernels, from `plans.json`."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from pallas_kernels import plans
from pallas_kernels.lora.layout import ceil_div

MIN_BLOCK = 16
"""Smallest block width of a tensor-core product."""


@dataclass(frozen=True)
class ShrinkPlan:
    """Block shapes of shrink.

    Attributes:
      block_r: rank rows per block.
      block_k: input columns per block.
      slice_k: input columns of one program, a multiple of block_k.
      warps: per program.
      stages: of the copy pipeline. It looks up pages before it reads them, so weights have `(stages - 2) / 2` buffers.
    """

    block_r: int
    block_k: int
    slice_k: int
    warps: int
    stages: int

    def splits(self, d_in: int) -> int:
        """Number of slices of an input of `d_in` columns."""
        return ceil_div(d_in, self.slice_k)


@dataclass(frozen=True)
class ExpandPlan:
    """Block shapes of expand.

    Attributes:
      block_r: rank rows per block.
      block_n: output columns per block.
      span_n: output columns of one program, a multiple of block_n.
      warps, stages: as in ShrinkPlan.
    """

    block_r: int
    block_n: int
    span_n: int
    warps: int
    stages: int


def shrink_plan(**facts: Any) -> ShrinkPlan:
    """facts: decode, rows, d_in, width."""
    plan = ShrinkPlan(**plans.find("lora", "lora_shrink", **facts))
    block_k = _block(plan.block_k, facts["width"])
    return replace(plan, block_k=block_k, slice_k=max(block_k, plan.slice_k))


def expand_plan(**facts: Any) -> ExpandPlan:
    """facts: decode, rows, d_out, width."""
    plan = ExpandPlan(**plans.find("lora", "lora_expand", **facts))
    block_n = _block(plan.block_n, facts["width"])
    return replace(plan, block_n=block_n, span_n=max(block_n, plan.span_n))


def tile_rows(**facts: Any) -> int:
    """Height of a step's LoRA tiles. facts: backend, decode."""
    return plans.find("lora", "tile", **facts)["rows"]


def _block(block: int, width: int) -> int:
    """`block` limited to a divisor of the pool's width, so that no block spans two tiles."""
    return min(block, width & -width)
