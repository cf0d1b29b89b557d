"""Static shapes of paged attention kernels, and their block shapes from `plans.json`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import jax.numpy as jnp

from pallas_kernels import plans
from pallas_kernels.kv_format import KvDtype


@dataclass(frozen=True)
class AttentionShape:
    """Static shape of a step's attention.

    Attributes:
      num_heads, num_kv_heads, head_dim: of the model, or of a shard.
      page_size: tokens of a page.
      dtype: of the products, and of the pool's keys and values unless `kv_dtype` is given.
      num_seqs: S, sequences of the batch.
      max_pages: columns of the page table.
      max_rows: bound of the step's rows T.
      decode: every sequence has one row.
      window: number of newest keys that a query sees, its own included; None: all keys up to its own.
      score_cap: limit of scores, as in `PagedAttention`; None: no limit.
      kv_dtype: format of keys and values of one byte (`kv_format`); None: `dtype`.
    """

    num_heads: int
    num_kv_heads: int
    head_dim: int
    page_size: int
    dtype: jnp.dtype
    num_seqs: int
    max_pages: int
    max_rows: int
    decode: bool
    window: int | None = None
    score_cap: float | None = None
    kv_dtype: KvDtype | None = None

    @property
    def group(self) -> int:
        """Query heads per key-value head."""
        return self.num_heads // self.num_kv_heads

    @property
    def width(self) -> int:
        """The pool's W."""
        return self.num_kv_heads * self.head_dim

    @property
    def max_tokens(self) -> int:
        """Bound of a sequence's tokens."""
        return self.max_pages * self.page_size

    def find(self, op: str) -> dict[str, Any]:
        """Returns the plan table's entry for this shape on the current trace's device."""
        return plans.find(
            "paged_attention", op, decode=self.decode, head_dim=self.head_dim, group=self.group, rows=self.max_rows
        )


@dataclass(frozen=True)
class TritonPlan:
    """Block shapes of the Triton kernel.

    Attributes:
      warps: per program.
      per_sm: programs that reside on one multiprocessor at once, as registers and shared memory allow.
      block_n: keys per block of a decode item.
      stages: depth of a decode item's copy pipeline.
      prefill_m, prefill_n: query rows (times heads of a group) and keys per block of a prefill item.
      prefill_stages: depth of its copy pipeline. All three are unused in decode steps.
    """

    warps: int
    per_sm: int
    block_n: int
    stages: int
    prefill_m: int = 0
    prefill_n: int = 0
    prefill_stages: int = 0


@dataclass(frozen=True)
class MosaicGpuPlan:
    """Block shapes of the Mosaic GPU kernel.

    Attributes:
      block_n: keys per block: 64, 128 or 256 (a tensor-core product, in whole pages per warp).
      stages: depth of the copy pipeline.

    Raises:
      ValueError: a field is outside these ranges.
    """

    block_n: int
    stages: int

    def __post_init__(self) -> None:
        if self.block_n not in (64, 128, 256) or self.stages < 1:
            raise ValueError(f"{self}: block_n must be 64, 128 or 256, and stages positive")


def backend(shape: AttentionShape) -> str:
    """Returns the name of the planned implementation for `shape` on the current trace's device."""
    name = shape.find("backend")["name"]
    return name if shape.score_cap is None else "triton"  # the only GPU kernel that limits scores


def triton_plan(shape: AttentionShape) -> TritonPlan:
    """Block shapes of the Triton kernel for `shape` on the current trace's device."""
    return TritonPlan(**shape.find("triton"))


def mosaic_gpu_plan(shape: AttentionShape) -> MosaicGpuPlan:
    """Block shapes of the Mosaic GPU kernel for `shape` on the current trace's device."""
    return MosaicGpuPlan(**shape.find("mosaic_gpu"))
