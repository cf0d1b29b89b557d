"""Decode and chunked-prefill attention over the unified pool."""

from pallas_kernels.paged_attention.api import AttentionTiles, PagedAttention, paged_attention

__all__ = ["AttentionTiles", "PagedAttention", "paged_attention"]
