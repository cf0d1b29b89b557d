"""Reads a model's weights and config for the check, independently of the engine's loader."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import gguf

from slora_jax.demo.verify import Weights, load_weights
from slora_jax.errors import UnsupportedModelError

_LAYER_NAMES = {
    "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_OTHER_NAMES = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}


def read_reference(model: Path) -> tuple[Weights, dict[str, Any]]:
    """Returns weights by Hugging Face name, and the config for `dense_logits`.

    Raises:
      UnsupportedModelError: the model is not a Llama, or has biases or scaled rotary positions.
    """
    weights, config = _read_gguf(model) if model.is_file() else _read_directory(model)
    parts = {name.split(".")[-2] for name in weights}
    known = {name.split(".")[-1] for name in (*_LAYER_NAMES.values(), *_OTHER_NAMES.values())}
    if parts - known or any(name.endswith(".bias") for name in weights):
        raise UnsupportedModelError(f"{model}: has tensors that the check does not support: {sorted(parts - known)}")
    weights.setdefault("lm_head.weight", weights["model.embed_tokens.weight"])
    return weights, config


def _read_directory(model: Path) -> tuple[Weights, dict[str, Any]]:
    config = json.loads((model / "config.json").read_text())
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    kind = rope.get("rope_type", rope.get("type", "default"))
    if config["model_type"] != "llama" or kind != "default":
        raise UnsupportedModelError(f"{model}: model_type={config['model_type']!r} with rope {kind!r}")
    config.setdefault("rope_theta", rope.get("rope_theta", 10000.0))
    weights: Weights = {}
    for file in sorted(model.glob("*.safetensors")):
        weights |= load_weights(file)
    return weights, config


def _read_gguf(file: Path) -> tuple[Weights, dict[str, Any]]:
    """Dequantises with `gguf`, and undoes llama.cpp's order of q and k rows, in which rotated pairs are adjacent."""
    reader = gguf.GGUFReader(file)

    def field(name: str, default: Any = None) -> Any:
        found = reader.get_field(name)
        return default if found is None else found.contents()

    if (family := field("general.architecture")) != "llama" or field("llama.rope.scaling.type", "none") != "none":
        raise UnsupportedModelError(f"{file}: architecture {family!r}, or scaled rotary positions")
    heads = field("llama.attention.head_count")
    ends = (field("tokenizer.ggml.eos_token_id"), field("tokenizer.ggml.eot_token_id"))
    config = {
        "hidden_size": field("llama.embedding_length"),
        "num_hidden_layers": field("llama.block_count"),
        "num_attention_heads": heads,
        "num_key_value_heads": field("llama.attention.head_count_kv", heads),
        "head_dim": field("llama.attention.key_length"),
        "rms_norm_eps": field("llama.attention.layer_norm_rms_epsilon"),
        "rope_theta": field("llama.rope.freq_base", 10000.0),
        "eos_token_id": [end for end in ends if end is not None],
    }
    weights = {}
    for tensor in reader.tensors:
        part, _, kind = tensor.name.rpartition(".")
        weight = gguf.dequantize(tensor.data, tensor.tensor_type)
        if part.startswith("blk."):
            _, layer, part = part.split(".")
            permuted_heads = {"attn_q": heads, "attn_k": config["num_key_value_heads"]}.get(part)
            if permuted_heads:
                weight = weight.reshape(permuted_heads, -1, 2, weight.shape[-1]).swapaxes(1, 2).reshape(weight.shape)
            part = f"model.layers.{layer}.{_LAYER_NAMES.get(part, part)}"
        weights[f"{_OTHER_NAMES.get(part, part)}.{kind}"] = weight
    return weights, config
