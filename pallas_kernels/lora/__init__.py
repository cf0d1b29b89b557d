"""Gathered LoRA products over adapters of any rank in the unified pool."""

from typing import TYPE_CHECKING

from pallas_kernels.exports import exported

if TYPE_CHECKING:
    from pallas_kernels.lora.api import Implementation, LoraProduct, lora_tile_rows
    from pallas_kernels.lora.layout import PROJECTIONS, LoraLayout, Stack
    from pallas_kernels.lora.tiles import AdapterTable, LoraTiles
else:
    __getattr__, __dir__, __all__ = exported(
        __name__,
        api="Implementation LoraProduct lora_tile_rows",
        layout="PROJECTIONS LoraLayout Stack",
        tiles="AdapterTable LoraTiles",
    )
