"""The benchmark's sizes: the real one, and a miniature that a CPU runs in a minute, whose numbers mean nothing.

Sizes of one op only are in the grids of its `bench.py`.
"""

from __future__ import annotations

from dataclasses import dataclass

from pallas_kernels.bench.models import LLAMA_3_8B, LLAMA_7B, TINY, TINY_MHA, Model


@dataclass(frozen=True)
class Size:
    """Sizes shared by all ops.

    Attributes:
      miniature: kernels run by their interpreters, on a CPU.
      model, second_model: the models whose layers are measured.
      page_size, pool_pages: of the pool of each of `layers` layers. A dispatch runs an op once in every layer, as a
        step does; the reference runs in one layer only.
      max_rank, slots: largest rank, and number, of resident adapters.
      max_context: tokens of the longest sequence.
      cache_bytes: dispatches rotate over inputs of this many bytes, which no cache holds.
      copy_bytes, matmul_width: of the ceilings.
      rounds, round_seconds: of the timing.
    """

    miniature: bool
    model: Model
    second_model: Model
    page_size: int
    pool_pages: int
    layers: int
    max_rank: int
    slots: int
    max_context: int
    cache_bytes: int
    copy_bytes: int
    matmul_width: int
    rounds: int
    round_seconds: float


FULL = Size(
    miniature=False,
    model=LLAMA_3_8B,
    second_model=LLAMA_7B,
    page_size=16,
    pool_pages=2**15,  # 2 GiB a layer: 512k tokens, or 208 adapters of rank 64
    layers=32,
    max_rank=128,
    slots=256,
    max_context=32768,
    cache_bytes=192 * 2**20,  # three times the H200's second-level cache
    copy_bytes=2**32,
    matmul_width=8192,
    rounds=7,
    round_seconds=0.03,
)

MINIATURE = Size(
    miniature=True,
    model=TINY,
    second_model=TINY_MHA,
    page_size=8,
    pool_pages=512,
    layers=1,
    max_rank=16,
    slots=4,
    max_context=48,
    cache_bytes=2**14,
    copy_bytes=2**16,
    matmul_width=64,
    rounds=1,
    round_seconds=1e-4,
)
