"""Mixtral: experts in every layer."""

from __future__ import annotations

from typing import Any

from slora_jax.models.families.family import Family, Sizes
from slora_jax.models.families.windows import one_window
from slora_jax.models.fields import Fields, refused
from slora_jax.models.traits import Experts


def experts_of(fields: Fields, count: str, width: int, normalised: bool) -> Experts:
    """Reads the experts of a layer. count: name of the field with their number."""
    experts = Experts(fields.positive_int(count), fields.positive_int("num_experts_per_tok"), width, normalised)
    if experts.per_token > experts.count:
        raise refused("num_experts_per_tok", experts.per_token, f"at most {count}={experts.count}")
    return experts


def _traits(fields: Fields, sizes: Sizes) -> dict[str, Any]:
    experts = experts_of(fields, "num_local_experts", sizes["intermediate_size"], True)
    return {**one_window(fields, sizes), "experts": experts}


FAMILY = Family(
    "mixtral",
    "MixtralForCausalLM",
    _traits,
    {
        "max_position_embeddings": 131072,
        "num_key_value_heads": 8,
        "rms_norm_eps": 1e-5,
        "rope_theta": 1000000.0,
        "num_local_experts": 8,
        "num_experts_per_tok": 2,
        "eos_token_id": 2,
    },
    router="block_sparse_moe.gate",
    expert={
        "gate": "block_sparse_moe.experts.{expert}.w1",
        "up": "block_sparse_moe.experts.{expert}.w3",
        "down": "block_sparse_moe.experts.{expert}.w2",
    },
)
