"""Gathered LoRA products over adapters of any rank in the unified pool."""

from pallas_kernels.lora.api import AdapterTable, LoraProduct, LoraTiles
from pallas_kernels.lora.layout import PROJECTIONS, LoraLayout, Stack

__all__ = ["PROJECTIONS", "AdapterTable", "LoraLayout", "LoraProduct", "LoraTiles", "Stack"]
