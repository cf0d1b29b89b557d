"""Mistral, with one window in all layers or none."""

from slora_jax.models.families.family import Family
from slora_jax.models.families.windows import one_window

FAMILY = Family(
    "mistral",
    "MistralForCausalLM",
    one_window,
    {"max_position_embeddings": 131072, "num_key_value_heads": 8, "sliding_window": 4096},
)
