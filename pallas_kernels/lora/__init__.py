"""Gathered LoRA products over adapters of any rank in the unified pool."""

from pallas_kernels.lora.api import AdapterTable, Implementation, LoraProduct, LoraTiles, lora_tile_rows
from pallas_kernels.lora.layout import PROJECTIONS, LoraLayout, Stack

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
