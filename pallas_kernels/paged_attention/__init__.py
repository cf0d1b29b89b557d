"""Decode and chunked-prefill attention over the unified pool."""

from typing import TYPE_CHECKING

from pallas_kernels.exports import exported

if TYPE_CHECKING:
    from pallas_kernels.paged_attention.api import PagedAttention, paged_attention
    from pallas_kernels.paged_attention.tiles import AttentionTiles
else:
    __getattr__, __dir__ = exported(
        __name__,
        {
            "pallas_kernels.paged_attention.api": ("PagedAttention", "paged_attention"),
            "pallas_kernels.paged_attention.tiles": ("AttentionTiles",),
        },
    )

__all__ = ["AttentionTiles", "PagedAttention", "paged_attention"]
