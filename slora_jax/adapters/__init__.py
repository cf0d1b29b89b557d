"""Adapters: the PEFT format in and out, their tiles, and the host store that keeps thousands of them."""

from slora_jax.adapters.adapter import LoraAdapter
from slora_jax.adapters.config import LoraConfig
from slora_jax.adapters.contents import Tier
from slora_jax.adapters.geometry import BaseGeometry
from slora_jax.adapters.peft_format import read_peft, write_peft
from slora_jax.adapters.store import AdapterInfo, AdapterStore, LoadReport, PreparedAdapter, StoreStats
from slora_jax.adapters.synthetic import random_adapter
from slora_jax.adapters.tiles import AdapterTiles, pack_tiles, unpack_tiles

__all__ = [
    "AdapterInfo",
    "AdapterStore",
    "AdapterTiles",
    "BaseGeometry",
    "LoadReport",
    "LoraAdapter",
    "LoraConfig",
    "PreparedAdapter",
    "StoreStats",
    "Tier",
    "pack_tiles",
    "random_adapter",
    "read_peft",
    "unpack_tiles",
    "write_peft",
]
