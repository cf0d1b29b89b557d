"""Decode and chunked-prefill attention over the unified pool."""

from typing import TYPE_CHECKING

from pallas_kernels.exports import exported

if TYPE_CHECKING:
    from pallas_kernels.paged_attention.api import AttentionTiles, PagedAttention, paged_attention
else:
    __getattr__, __dir__ = exported(
        __name__,
        {
            "pallas_kernels.paged_attention.api": ("AttentionTiles", "PagedAttention", "paged_attention"),
        },
    )

__all__ = ["AttentionTiles", "PagedAttention", "paged_attention"]
