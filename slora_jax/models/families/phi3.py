"""Phi-3, Phi-3.5 and Phi-4: fused tensors, longrope."""

from __future__ import annotations

from typing import Any

from slora_jax.models.families.family import Family, Sizes
from slora_jax.models.families.windows import one_window
from slora_jax.models.fields import Fields, refused
from slora_jax.models.rope_fields import merged_rope_fields, rope_of


def _traits(fields: Fields, sizes: Sizes) -> dict[str, Any]:
    rope = merged_rope_fields(fields)
    rope.setdefault("partial_rotary_factor", 1.0)
    if rope.get("rope_type") in ("su", "yarn"):  # names of longrope in the first releases
        rope["rope_type"] = "longrope"
    if rope.get("rope_type", "default") not in ("default", "longrope"):
        raise refused("rope_type", rope["rope_type"], "'default' or 'longrope'")
    if rope.get("rope_type") == "longrope":
        rope["original_max_position_embeddings"] = fields.get("original_max_position_embeddings")
    fields.get("original_max_position_embeddings")
    return {
        **one_window(fields, sizes),
        "rope": rope_of(rope, sizes["max_position_embeddings"], sizes["head_dim"]),
    }


FAMILY = Family(
    "phi3",
    "Phi3ForCausalLM",
    _traits,
    {
        "max_position_embeddings": 4096,
        "original_max_position_embeddings": 4096,
        "rms_norm_eps": 1e-5,
        "eos_token_id": 32000,
    },
    fused={"qkv": "self_attn.qkv_proj", "gate_up": "mlp.gate_up_proj"},
)
