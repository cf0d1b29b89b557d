"""Llama 1, 2 and 3."""

from __future__ import annotations

from typing import Any

from slora_jax.models.families.family import Family, Sizes, bias_traits
from slora_jax.models.fields import Fields


def _traits(fields: Fields, sizes: Sizes) -> dict[str, Any]:
    return {**bias_traits(fields, sizes), "mlp_bias": fields.boolean("mlp_bias")}


FAMILY = Family("llama", "LlamaForCausalLM", _traits, {"max_position_embeddings": 2048})
