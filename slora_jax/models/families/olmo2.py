"""OLMo 2: norms after attention and feed-forward, and over the whole width of queries and keys."""

from __future__ import annotations

from typing import Any

from slora_jax.models.families.family import Family, Sizes, bias_traits
from slora_jax.models.fields import Fields


def _traits(fields: Fields, sizes: Sizes) -> dict[str, Any]:
    return {"norms": "after", "qk_norm": "width", **bias_traits(fields, sizes)}


FAMILY = Family(
    "olmo2",
    "Olmo2ForCausalLM",
    _traits,
    {"max_position_embeddings": 2048, "rms_norm_eps": 1e-5, "eos_token_id": 50279},
    norms={
        "attention_output_norm": "post_attention_layernorm",
        "feed_forward_output_norm": "post_feedforward_layernorm",
    },
)
