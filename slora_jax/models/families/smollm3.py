"""SmolLM3: one layer in four does not rotate queries and keys."""

from __future__ import annotations

from typing import Any

from slora_jax.models.families.family import Family, Sizes, bias_traits
from slora_jax.models.families.windows import layer_windows
from slora_jax.models.fields import Fields


def _traits(fields: Fields, sizes: Sizes) -> dict[str, Any]:
    layers, every = sizes["num_layers"], fields.positive_int("no_rope_layer_interval")
    rotated = fields.per_layer("no_rope_layers", layers, (0, 1))
    if rotated is None:
        rotated = tuple((layer + 1) % every != 0 for layer in range(layers))
    rotated = tuple(map(bool, rotated))
    traits = {**bias_traits(fields, sizes), "mlp_bias": fields.boolean("mlp_bias"), "rope_layers": rotated}
    if fields.boolean("use_sliding_window"):
        traits |= layer_windows(fields, sizes, [not one for one in rotated])
    fields.get("sliding_window")
    return traits


FAMILY = Family(
    "smollm3",
    "SmolLM3ForCausalLM",
    _traits,
    {
        "max_position_embeddings": 32768,
        "num_key_value_heads": 4,
        "rope_theta": 2000000.0,
        "no_rope_layer_interval": 4,
        "tie_word_embeddings": True,
        "eos_token_id": 128001,
    },
)
