"""Gemma 2: every second layer has a window; scores and logits are limited."""

from __future__ import annotations

from typing import Any

from slora_jax.models.families.family import Family, Sizes, bias_traits
from slora_jax.models.families.windows import layer_windows
from slora_jax.models.fields import Fields

DEFAULTS = {
    "num_key_value_heads": 4,
    "head_dim": 256,
    "hidden_activation": "gelu_pytorch_tanh",
    "query_pre_attn_scalar": 256,
    "sliding_window": 4096,
    "tie_word_embeddings": True,
    "eos_token_id": 1,
}
NORMS = {
    "input_norm": "input_layernorm",
    "attention_output_norm": "post_attention_layernorm",
    "post_attention_norm": "pre_feedforward_layernorm",
    "feed_forward_output_norm": "post_feedforward_layernorm",
}


def gemma_traits(fields: Fields, sizes: Sizes) -> dict[str, Any]:
    """Reads what Gemma 2 and 3 have in common."""
    fields.get("hidden_act")  # transformers uses hidden_activation alone
    return {
        "norms": "around",
        "attention_scale": fields.positive_number("query_pre_attn_scalar") ** -0.5,
        "score_cap": fields.optional_number("attn_logit_softcapping"),
        "logit_cap": fields.optional_number("final_logit_softcapping"),
        "embedding_multiplier": sizes["hidden_size"] ** 0.5,
        **bias_traits(fields, sizes),
    }


def _traits(fields: Fields, sizes: Sizes) -> dict[str, Any]:
    windows = layer_windows(fields, sizes, [layer % 2 == 0 for layer in range(sizes["num_layers"])])
    return {**gemma_traits(fields, sizes), **windows}


FAMILY = Family(
    "gemma2",
    "Gemma2ForCausalLM",
    _traits,
    {
        **DEFAULTS,
        "max_position_embeddings": 8192,
        "attn_logit_softcapping": 50.0,
        "final_logit_softcapping": 30.0,
    },
    activation=("hidden_activation", ("gelu_pytorch_tanh",)),
    norms=NORMS,
    norm_offset=1.0,
)
