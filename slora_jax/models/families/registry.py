"""The supported architectures by `model_type`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from slora_jax.models.families import (
    gemma2,
    gemma3,
    gemma3_text,
    glm4,
    granite,
    llama,
    mistral,
    mixtral,
    olmo2,
    phi3,
    qwen2,
    qwen3,
    qwen3_moe,
    smollm3,
)
from slora_jax.models.families.family import Family
from slora_jax.models.fields import refused

_MODULES = (
    gemma2, gemma3, gemma3_text, glm4, granite, llama, mistral, mixtral, olmo2, phi3, qwen2, qwen3, qwen3_moe, smollm3
)  # fmt: skip
FAMILIES: dict[str, Family] = {module.FAMILY.name: module.FAMILY for module in _MODULES}


def family_of(hf_config: Mapping[str, Any]) -> Family:
    """Returns the family of a `config.json`. Raises `UnsupportedModelError` if it is not supported."""
    name = hf_config.get("model_type")
    if not isinstance(name, str) or name not in FAMILIES:
        raise refused("model_type", name, f"one of {sorted(FAMILIES)}")
    return FAMILIES[name]
