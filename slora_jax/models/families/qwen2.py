"""Qwen2 and Qwen2.5."""

from __future__ import annotations

from typing import Any

from slora_jax.models.families.family import Family, Sizes
from slora_jax.models.families.windows import layer_windows
from slora_jax.models.fields import Fields


def switched_windows(fields: Fields, sizes: Sizes) -> dict[str, Any]:
    """Reads Qwen's window. If it is on, the layers from `max_window_layers` on have it, or those of `layer_types`."""
    window, first = fields.get("sliding_window"), fields.get("max_window_layers")
    if not fields.boolean("use_sliding_window") or window is None:
        return {}
    return layer_windows(fields, sizes, [layer >= first for layer in range(sizes["num_layers"])])


def _traits(fields: Fields, sizes: Sizes) -> dict[str, Any]:
    return {"qkv_bias": True, **switched_windows(fields, sizes)}


FAMILY = Family(
    "qwen2",
    "Qwen2ForCausalLM",
    _traits,
    {"max_position_embeddings": 32768, "num_key_value_heads": 32, "sliding_window": 4096, "max_window_layers": 28},
    implied=frozenset({"attention_qkv_bias", "qkv_bias", "use_qkv_bias"}),
)
