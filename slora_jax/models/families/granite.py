"""Granite 3: multipliers of embeddings, scores, residual and logits."""

from __future__ import annotations

from typing import Any

from slora_jax.models.families.family import Family, Sizes, bias_traits
from slora_jax.models.fields import Fields


def _traits(fields: Fields, sizes: Sizes) -> dict[str, Any]:
    return {
        **bias_traits(fields, sizes),
        "mlp_bias": fields.boolean("mlp_bias"),
        "attention_scale": fields.positive_number("attention_multiplier"),
        "embedding_multiplier": fields.positive_number("embedding_multiplier"),
        "residual_multiplier": fields.positive_number("residual_multiplier"),
        "logits_scaling": fields.positive_number("logits_scaling"),
    }


FAMILY = Family(
    "granite",
    "GraniteForCausalLM",
    _traits,
    {
        "max_position_embeddings": 2048,
        "attention_multiplier": 1.0,
        "embedding_multiplier": 1.0,
        "residual_multiplier": 1.0,
        "logits_scaling": 1.0,
        "eos_token_id": 2,
    },
)
