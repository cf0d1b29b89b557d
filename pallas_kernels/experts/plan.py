"""Block shapes of the kernels of experts, from `plans.json`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from pallas_kernels import plans


@dataclass(frozen=True)
class ProductPlan:
    """Block shapes of one product.

    Attributes:
      block_n: output columns of an item; of gate_up, columns of the gate and as many of up.
      block_k: input columns per block.
      warps: per program.
      stages: of the copy pipeline; 1: none.
    """

    block_n: int
    block_k: int
    warps: int
    stages: int


@dataclass(frozen=True)
class ExpertPlan:
    """Block shapes of a layer's experts. tile_rows: rows of one expert in an item of either product, at least 16."""

    tile_rows: int
    gate_up: ProductPlan
    down: ProductPlan


def expert_plan(**facts: Any) -> ExpertPlan:
    """facts: rows_per_expert, the mean number of rows."""
    gate_up, down = (ProductPlan(**plans.find("experts", op, **facts)) for op in ("gate_up", "down"))
    return ExpertPlan(plans.find("experts", "tile", **facts)["rows"], gate_up, down)
