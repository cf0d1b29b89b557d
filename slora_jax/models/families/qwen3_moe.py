"""Qwen3 with experts, in all layers or some."""

from __future__ import annotations

from typing import Any

from slora_jax.models.families import qwen3
from slora_jax.models.families.family import Family, Sizes, bias_traits
from slora_jax.models.families.mixtral import experts_of
from slora_jax.models.families.windows import one_window
from slora_jax.models.fields import Fields


def _traits(fields: Fields, sizes: Sizes) -> dict[str, Any]:
    layers, step = range(sizes["num_layers"]), fields.positive_int("decoder_sparse_step")
    dense = fields.get("mlp_only_layers") or ()
    count = "num_local_experts" if "num_local_experts" in fields.given else "num_experts"  # transformers 5, and 4
    width, normalised = fields.positive_int("moe_intermediate_size"), fields.boolean("norm_topk_prob")
    windows = one_window(fields, sizes)
    if not fields.boolean("use_sliding_window"):
        windows = {}
    return {
        "qk_norm": "head",
        **bias_traits(fields, sizes),
        **windows,
        "experts": experts_of(fields, count, width, normalised),
        "expert_layers": tuple(layer not in dense and (layer + 1) % step == 0 for layer in layers),
    }


FAMILY = Family(
    "qwen3_moe",
    "Qwen3MoeForCausalLM",
    _traits,
    {
        "max_position_embeddings": 32768,
        "num_key_value_heads": 4,
        "sliding_window": 4096,
        "decoder_sparse_step": 1,
        "moe_intermediate_size": 768,
        "num_experts": 128,
        "num_experts_per_tok": 8,
    },
    implied=qwen3.FAMILY.implied,
    router="mlp.gate",
    expert={part: f"mlp.experts.{{expert}}.{part}_proj" for part in ("gate", "up", "down")},
)
