"""Qwen3 without experts."""

from __future__ import annotations

from typing import Any

from slora_jax.models.families.family import Family, Sizes, bias_traits
from slora_jax.models.families.qwen2 import switched_windows
from slora_jax.models.fields import Fields


def _traits(fields: Fields, sizes: Sizes) -> dict[str, Any]:
    return {"qk_norm": "head", **bias_traits(fields, sizes), **switched_windows(fields, sizes)}


FAMILY = Family(
    "qwen3",
    "Qwen3ForCausalLM",
    _traits,
    {
        "max_position_embeddings": 32768,
        "num_key_value_heads": 32,
        "head_dim": 128,
        "sliding_window": 4096,
        "max_window_layers": 28,
    },
    implied=frozenset({"qk_layernorm", "qk_norm", "use_qk_norm"}),
)
