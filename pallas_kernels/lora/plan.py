"""Block shapes of the LoRA kernels, from `plans.json`."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from pallas_kernels import devices, plans
from pallas_kernels.lora.layout import ceil_div

MIN_BLOCK = 16
"""Smallest block width of a tensor-core product."""


@dataclass(frozen=True)
class ShrinkPlan:
    """Block shapes of shrink.

    Attributes:
      block_k: input columns per block.
      slice_k: input columns of one item, a multiple of block_k.
      warps: per program.
      stages: of the copy pipeline; 1: none.
      programs: per multiprocessor.
    """

    block_k: int
    slice_k: int
    warps: int
    stages: int
    programs: int

    def splits(self, d_in: int) -> int:
        """Number of slices of an input of `d_in` columns."""
        return ceil_div(d_in, self.slice_k)


@dataclass(frozen=True)
class ExpandPlan:
    """Block shapes of expand.

    Attributes:
      block_n: output columns per item.
      warps, stages, programs: as in ShrinkPlan.
    """

    block_n: int
    warps: int
    stages: int
    programs: int


@dataclass(frozen=True)
class GradientPlan:
    """Block shapes of the gradients of A and B.

    Attributes:
      block_r: ranks of a product.
      block_n: columns per item.
      warps, stages, programs: as in ShrinkPlan.
    """

    block_r: int
    block_n: int
    warps: int
    stages: int
    programs: int


def shrink_plan(**facts: Any) -> ShrinkPlan:
    """facts: decode, rows, d_in, width."""
    plan = ShrinkPlan(**plans.find("lora", "lora_shrink", **facts))
    block_k = _block(plan.block_k, facts["width"])
    return replace(plan, block_k=block_k, slice_k=max(block_k, plan.slice_k))


def expand_plan(**facts: Any) -> ExpandPlan:
    """facts: decode, rows, d_out, width, page_size. The table is for pages of at most 16 rows; higher ones get narrower
    blocks, with as many weights."""
    plan = ExpandPlan(**plans.find("lora", "lora_expand", **facts))
    block_n = max(MIN_BLOCK, plan.block_n * MIN_BLOCK // max(MIN_BLOCK, facts["page_size"]))
    return replace(plan, block_n=_block(block_n, facts["width"]))


def gradient_plan(**facts: Any) -> GradientPlan:
    """facts: rank, width, page_size. rank: bound of the ranks of a stack's A, or of a projection's B."""
    rank = max(facts["rank"], facts["page_size"])
    plan = GradientPlan(**plans.find("lora", "lora_gradient", **facts | {"rank": rank}))
    return replace(plan, block_n=_block(plan.block_n, facts["width"]))


def tile_rows(**facts: Any) -> int:
    """Height of a step's LoRA tiles. facts: backend, decode."""
    return plans.find("lora", "tile", **facts)["rows"]


def block_ranks(page_size: int, **facts: Any) -> int:
    """Ranks of an item of shrink, in whole tiles of `page_size` rows. facts: as in `tile_rows`."""
    return max(page_size, plans.find("lora", "tile", **facts)["ranks"])


def programs(per_multiprocessor: int, most: int) -> int:
    """Number of programs that share `most` items on the current trace's device. An interpreter counts as one
    multiprocessor."""
    device = devices.target()
    return min(most, per_multiprocessor * (device.num_sms if device else 1))


def _block(block: int, width: int) -> int:
    """`block` limited to a divisor of the pool's width, so that no block spans two tiles."""
    return min(block, width & -width)
