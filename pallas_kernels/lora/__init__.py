"""Gathered LoRA products over adapters of any rank in the unified pool."""

from typing import TYPE_CHECKING

from pallas_kernels.exports import exported

if TYPE_CHECKING:
    from pallas_kernels.lora.api import AdapterTable, Implementation, LoraProduct, LoraTiles, lora_tile_rows
    from pallas_kernels.lora.layout import PROJECTIONS, LoraLayout, Stack
else:
    __getattr__, __dir__ = exported(
        __name__,
        {
            "pallas_kernels.lora.api": ("AdapterTable", "Implementation", "LoraProduct", "LoraTiles", "lora_tile_rows"),
            "pallas_kernels.lora.layout": ("PROJECTIONS", "LoraLayout", "Stack"),
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
