"""Paged attention for Hopper (sm_90a) in Pallas Mosaic GPU: TMA copies of pages, warpgroup MMA products."""

from pallas_kernels.paged_attention.mosaic_gpu.attention import Attention

__all__ = ["Attention"]
