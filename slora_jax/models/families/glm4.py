"""GLM-4 (0414): neighbouring components are rotated, in half of each head; norms before and after."""

from __future__ import annotations

from typing import Any

from slora_jax.models.families.family import Family, Sizes
from slora_jax.models.fields import Fields


def _traits(fields: Fields, sizes: Sizes) -> dict[str, Any]:
    return {"norms": "around", "qkv_bias": fields.boolean("attention_bias")}


FAMILY = Family(
    "glm4",
    "Glm4ForCausalLM",
    _traits,
    {
        "max_position_embeddings": 131072,
        "num_key_value_heads": 2,
        "head_dim": 128,
        "rms_norm_eps": 1.5625e-07,
        "attention_bias": True,
        "eos_token_id": [151329, 151336, 151338],
    },
    partial_rotary=0.5,
    interleaved_rotary=True,
    norms={
        "input_norm": "input_layernorm",
        "attention_output_norm": "post_self_attn_layernorm",
        "post_attention_norm": "post_attention_layernorm",
        "feed_forward_output_norm": "post_mlp_layernorm",
    },
    fused={"gate_up": "mlp.gate_up_proj"},
)
