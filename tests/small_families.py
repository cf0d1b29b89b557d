"""Small random models of Mistral, Qwen2 and the families that `peft_families` lacks, each with one PEFT adapter."""

from pathlib import Path
from typing import Any

import numpy as np
import torch
from peft_families import add_adapters, make_base

ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]
ALL = [*ATTENTION, "gate_proj", "up_proj", "down_proj"]
GEMMA3_ROPES = {
    "full_attention": {"rope_type": "linear", "rope_theta": 1e5, "factor": 8.0},
    "sliding_attention": {"rope_type": "default", "rope_theta": 1e3},
}
LONGROPE = {
    "rope_type": "longrope",
    "rope_theta": 1000.0,
    "short_factor": [1.0] * 6,
    "long_factor": [1.0, 1.5, 2.0, 2.5, 3.0, 4.0],
    "partial_rotary_factor": 0.75,
}
# model_type, fields of its config, targets of the adapter
FAMILIES: dict[str, tuple[str, dict[str, Any], list[str]]] = {
    "gemma2": (
        "gemma2",
        {
            "query_pre_attn_scalar": 24,
            "sliding_window": 20,
            "attn_logit_softcapping": 4.0,
            "final_logit_softcapping": 40.0,
        },
        ALL,
    ),
    "gemma3_text": (
        "gemma3_text",
        {
            "num_hidden_layers": 3,
            "sliding_window": 20,
            "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
            "rope_parameters": GEMMA3_ROPES,
        },
        ALL,
    ),
    "phi3": (
        "phi3",
        {"num_attention_heads": 4, "rope_parameters": LONGROPE, "original_max_position_embeddings": 8},
        ["qkv_proj", "o_proj", "gate_up_proj", "down_proj"],
    ),
    "smollm3": ("smollm3", {"num_hidden_layers": 4}, ALL),
    "granite": (
        "granite",
        {
            "attention_multiplier": 0.2,
            "embedding_multiplier": 3.0,
            "residual_multiplier": 0.5,
            "logits_scaling": 1.5,
        },
        ALL,
    ),
    "mistral": ("mistral", {"sliding_window": 20}, ALL),
    "qwen2": ("qwen2", {}, ALL),
    "olmo2": ("olmo2", {}, ALL),
    "glm4": ("glm4", {}, [*ATTENTION, "gate_up_proj", "down_proj"]),
    "mixtral": ("mixtral", {"num_local_experts": 5, "intermediate_size": 24}, ATTENTION),
    "qwen3_moe": (
        "qwen3_moe",
        {
            "num_experts": 6,
            "num_experts_per_tok": 3,
            "moe_intermediate_size": 24,
            "mlp_only_layers": [1],
        },
        ATTENTION,
    ),
}


class SmallFamily:
    """A random model with one adapter, in memory and as saved by transformers and PEFT."""

    def __init__(self, name: str, directory: Path, targets: list[str] | str | None = None) -> None:
        """targets: in place of the family's."""
        kind, fields, own = FAMILIES[name]
        base = make_base(kind, {"pad_token_id": 0, "eos_token_id": 1, **fields})
        self.model_dir, self.adapter_dir = directory / "model", directory / "tuned"
        base.save_pretrained(self.model_dir)
        self.model = add_adapters(
            base, directory, {"tuned": {"r": 5, "lora_alpha": 9, "target_modules": targets or own}}
        )

    def active(self, adapter: str | None) -> Any:
        """Returns the PEFT model with this adapter active (None: the base model)."""
        layers = self.model.base_model
        layers.disable_adapter_layers() if adapter is None else layers.enable_adapter_layers()
        return self.model

    def logits(self, adapter: str | None, ids: list[int]) -> np.ndarray:
        """Returns PEFT's logits `[len(ids), vocab]`."""
        with torch.no_grad():
            return self.active(adapter)(torch.tensor([ids])).logits[0].numpy()
