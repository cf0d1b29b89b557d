"""What a paged attention kernel is compiled for, and its block shapes, from `plans.json`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import jax.numpy as jnp

from pallas_kernels import plans


@dataclass(frozen=True)
class AttentionShape:
    """The static facts of a step's attention.

    page_size: tokens of a page. dtype: the pool's. num_seqs: S. max_pages: columns of the page table. max_rows: bound
    of the step's rows T. decode: every sequence has one row. window: keys that a query sees, its own included (None:
    all before it, too).
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

    @property
    def group(self) -> int:
        """Query heads that share a key-value head."""
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
        """Entry of the plan table for this shape on the current trace's device."""
        return plans.find(
            "paged_attention", op, decode=self.decode, head_dim=self.head_dim, group=self.group, rows=self.max_rows
        )


@dataclass(frozen=True)
class TritonPlan:
    """Block shapes of the Triton kernel.

    warps: of a program. block_n, stages: keys of a decode program at once, and the depth of its copy pipeline.
    min_chunk: least tokens of a decode sequence that are worth a program of their own. programs: how many programs
    should share the decode work where there are too few sequences and heads.
    prefill_m, prefill_n, prefill_stages: query rows (times heads of a group) and keys of a prefill program at once, and
    its pipeline; unused in decode programs.
    """

    warps: int
    block_n: int
    stages: int
    min_chunk: int
    programs: int
    prefill_m: int = 0
    prefill_n: int = 0
    prefill_stages: int = 0


@dataclass(frozen=True)
class MosaicGpuPlan:
    """Block shapes of the Mosaic GPU kernels.

    block_n, stages: keys of a block at once, and the depth of its copy pipeline. min_chunk: shortest context chunk of a
    decode block, in tokens. programs: decode blocks wanted beyond one per sequence and KV head. Raises ValueError where
    block_n is not 64, 128 or 256 (a tensor core's product, in whole pages for each warp), or no divisor of min_chunk.
    """

    block_n: int
    stages: int
    min_chunk: int = 0
    programs: int = 0

    def __post_init__(self) -> None:
        if self.block_n not in (64, 128, 256) or self.stages < 1 or self.min_chunk % self.block_n:
            raise ValueError(f"{self}: block_n must be 64, 128 or 256 and divide min_chunk, and stages positive")


def backend(shape: AttentionShape) -> str:
    """Name of the implementation that is fastest for `shape` on the current trace's device."""
    return shape.find("backend")["name"]


def triton_plan(shape: AttentionShape) -> TritonPlan:
    """Block shapes of the Triton kernel for `shape` on the current trace's device."""
    return TritonPlan(**shape.find("triton"))


def mosaic_gpu_plan(shape: AttentionShape) -> MosaicGpuPlan:
    """Block shapes of the Mosaic GPU kernels for `shape` on the current trace's device."""
    return MosaicGpuPlan(**shape.find("mosaic_gpu"))
