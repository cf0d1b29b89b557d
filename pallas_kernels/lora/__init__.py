"""Gathered LoRA products over adapters of any rank in the unified pool."""

from typing import TYPE_CHECKING

from pallas_kernels.exports import exported

if TYPE_CHECKING:
    from pallas_kernels.lora.api import Implementation, LoraProduct, lora_tile_rows
    from pallas_kernels.lora.layout import PROJECTIONS, LoraLayout, Stack
    from pallas_kernels.lora.tiles import AdapterTable, LoraTiles
else:
    __getattr__, __dir__ = exported(
        __name__,
        {
            "pallas_kernels.lora.api": ("Implementation", "LoraProduct", "lora_tile_rows"),
            "pallas_kernels.lora.layout": ("PROJECTIONS", "LoraLayout", "Stack"),
            "pallas_kernels.lora.tiles": ("AdapterTable", "LoraTiles"),
        },
    )

__all__ = [
    "PROJECTIONS",
    "AdapterTable",
    "Implementation",
    "LoraLayout",
    "LoraProduct",
    "LoraTiles",
    "Stack",
    "lora_tile_rows",
]
