"""Gemma 3, text: one layer in six sees all keys and has its own rotary embedding."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from slora_jax.models.families.family import Family, Sizes
from slora_jax.models.families.gemma2 import DEFAULTS, NORMS, gemma_traits
from slora_jax.models.families.windows import KINDS, layer_windows
from slora_jax.models.fields import Fields, refused
from slora_jax.models.rope_fields import rope_of

_THETAS = {"full_attention": ("rope_theta", 1_000_000.0), "sliding_attention": ("rope_local_base_freq", 10_000.0)}


def gemma3_traits(fields: Fields, sizes: Sizes) -> dict[str, Any]:
    """Reads the traits of Gemma 3."""
    fields.get("_sliding_window_pattern")  # transformers 5 writes it beside layer_types
    every = fields.positive_int("sliding_window_pattern")
    windows = layer_windows(fields, sizes, [(layer + 1) % every != 0 for layer in range(sizes["num_layers"])])
    ropes = {kind: _rope(fields, kind, sizes) for kind in KINDS}
    return {
        "qk_norm": "head",
        **gemma_traits(fields, sizes),
        **windows,
        "rope": ropes["full_attention"],
        "local_rope": ropes["sliding_attention"],
    }


def _rope(fields: Fields, kind: str, sizes: Sizes) -> Any:
    """Reads the rotary embedding of the layers of a kind, from `rope_parameters` (transformers 5) or
    `rope_theta`, `rope_local_base_freq` and `rope_scaling`, which is that of full attention (transformers 4)."""
    parameters = fields.get("rope_parameters") or {}
    if not isinstance(parameters, Mapping) or not parameters.keys() <= set(KINDS):
        raise refused("rope_parameters", parameters, f"a dictionary with {' and '.join(KINDS)}, or null")
    scaling = fields.get("rope_scaling")
    found = {**(parameters.get(kind) or {}), **((scaling or {}) if kind == "full_attention" else {})}
    found = {("rope_type" if name == "type" else name): value for name, value in found.items() if value is not None}
    field, default = _THETAS[kind]
    found.setdefault("rope_theta", fields.get(field) or default)
    return rope_of(found, sizes["max_position_embeddings"], sizes["head_dim"])


FAMILY = Family(
    "gemma3_text",
    "Gemma3ForCausalLM",
    gemma3_traits,
    {**DEFAULTS, "max_position_embeddings": 131072, "sliding_window_pattern": 6},
    activation=("hidden_activation", ("gelu_pytorch_tanh",)),
    norms=NORMS,
    norm_offset=1.0,
)
