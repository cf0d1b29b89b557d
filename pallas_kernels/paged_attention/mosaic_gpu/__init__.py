"""Paged attention for Hopper (sm_90a) in Pallas Mosaic GPU: pages come by TMA, products run on warpgroup MMA."""

from pallas_kernels.paged_attention.mosaic_gpu.attention import Attention

__all__ = ["Attention"]
