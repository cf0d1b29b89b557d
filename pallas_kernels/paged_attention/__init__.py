"""Decode and chunked-prefill attention over the unified pool."""

from typing import TYPE_CHECKING

from pallas_kernels.exports import exported

if TYPE_CHECKING:
    from pallas_kernels.paged_attention.api import PagedAttention, paged_attention
    from pallas_kernels.paged_attention.tiles import AttentionTiles
else:
    __getattr__, __dir__, __all__ = exported(
        __name__,
        api="PagedAttention paged_attention",
        tiles="AttentionTiles",
    )
