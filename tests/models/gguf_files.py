"""Writes GGUF files of tiny models like llama.cpp's converter."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from gguf import GGMLQuantizationType as Kind

QUANTISABLE = ("F32", "F16", "BF16", "Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1")
K_QUANTS = {  # bytes of a block, and where in it the float16 scales are
    "Q2_K": (84, (80, 82)),
    "Q3_K": (110, (108,)),
    "Q4_K": (144, (0, 2)),
    "Q5_K": (176, (0, 2)),
    "Q6_K": (210, (208,)),
}
_LAYER_NAMES = {
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
_OTHER_NAMES = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}


def quantised(weight: np.ndarray, kind: str, rng: np.random.Generator) -> np.ndarray:
    """Returns the weight in this type; for a K-quant, which gguf cannot write, random blocks of the same size."""
    if kind in QUANTISABLE:
        return gguf.quantize(np.ascontiguousarray(weight, np.float32), Kind[kind])
    return random_blocks(kind, *weight.shape, rng)


def random_blocks(kind: str, rows: int, columns: int, rng: np.random.Generator) -> np.ndarray:
    """Returns random K-quant blocks, uint8 `[rows, bytes]`, whose values have a standard deviation of about 0.2."""
    size, scales = K_QUANTS[kind]
    blocks = rng.integers(0, 256, (rows * columns // 256, size), np.uint8)
    scale = np.float16(1)
    for _ in range(2):  # first with scale 1, to see how large the values are
        for at in scales:
            blocks[:, at : at + 2] = np.frombuffer(scale.tobytes(), np.uint8)
        packed = blocks.reshape(rows, -1)
        scale = np.float16(0.2 * scale / gguf.dequantize(packed, Kind[kind]).std())
    return packed


def permuted(weight: np.ndarray, heads: int) -> np.ndarray:
    """Returns rows of q or k in llama.cpp's order for Llama: rows rotated together are adjacent."""
    return weight.reshape(heads, 2, -1, *weight.shape[1:]).swapaxes(1, 2).reshape(weight.shape)


def unpermuted(weight: np.ndarray, heads: int) -> np.ndarray:
    return weight.reshape(heads, -1, 2, *weight.shape[1:]).swapaxes(1, 2).reshape(weight.shape)


def gguf_metadata(config: Any, architecture: str) -> dict[str, Any]:
    """Returns the converter's metadata of a transformers config, with a tokenizer of its vocabulary size."""
    prefix, head_dim = architecture, getattr(config, "head_dim", None)
    head_dim = head_dim or config.hidden_size // config.num_attention_heads
    return {
        f"{prefix}.context_length": config.max_position_embeddings,
        f"{prefix}.embedding_length": config.hidden_size,
        f"{prefix}.block_count": config.num_hidden_layers,
        f"{prefix}.feed_forward_length": config.intermediate_size,
        f"{prefix}.attention.head_count": config.num_attention_heads,
        f"{prefix}.attention.head_count_kv": config.num_key_value_heads,
        f"{prefix}.attention.key_length": head_dim,
        f"{prefix}.attention.value_length": head_dim,
        f"{prefix}.attention.layer_norm_rms_epsilon": float(config.rms_norm_eps),
        f"{prefix}.rope.freq_base": float(config.rope_parameters["rope_theta"]),
        f"{prefix}.rope.dimension_count": head_dim,
        f"{prefix}.vocab_size": config.vocab_size,
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": [f"<{index}>" for index in range(config.vocab_size)],
        "tokenizer.ggml.scores": [-float(index) for index in range(config.vocab_size)],
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
    }


def write_model(
    file: Path,
    model: torch.nn.Module,
    kind: Callable[[str], str] = lambda name: "F32",
    architecture: str | None = None,
    metadata: dict[str, Any] | None = None,
    tensors: dict[str, tuple[np.ndarray, str] | None] | None = None,
) -> dict[str, torch.Tensor]:
    """Writes a transformers model and returns the weights that the file has, under their Hugging Face names.

    Args:
      kind: Tensor type by GGUF name, for tensors of two dimensions; the others are F32.
      architecture: GGUF's; by default, the model's family, which is "llama" for Mistral.
      metadata: Fields to add or replace; None removes one.
      tensors: Raw tensors to add or replace, with their type, by GGUF name; None removes one.
    """
    config, rng = model.config, np.random.default_rng(0)
    architecture = architecture or {"mistral": "llama"}.get(config.model_type, config.model_type)
    written, state = {}, {}
    for name, weight in model.state_dict().items():
        if name == "lm_head.weight" and config.tie_word_embeddings:
            continue
        ours, values = gguf_name(name), weight.numpy()
        heads = {"attn_q": config.num_attention_heads, "attn_k": config.num_key_value_heads}.get(ours.split(".")[-2])
        moved = heads and architecture in ("llama", "mistral")
        type_name = kind(ours) if values.ndim == 2 else "F32"
        packed = quantised(permuted(values, heads) if moved else values, type_name, rng)
        written[ours] = (packed, type_name)
        values = gguf.dequantize(packed, Kind[type_name])
        state[name] = torch.from_numpy(np.array(unpermuted(values, heads) if moved else values))
    fields = {"general.architecture": architecture, **gguf_metadata(config, architecture), **(metadata or {})}
    write_file(file, fields, {**written, **(tensors or {})})
    return state


def gguf_name(name: str) -> str:
    part, _, suffix = name.rpartition(".")
    if part in _OTHER_NAMES:
        return f"{_OTHER_NAMES[part]}.{suffix}"
    _, _, layer, part = part.split(".", 3)
    return f"blk.{layer}.{_LAYER_NAMES[part]}.{suffix}"


def write_file(
    file: Path, metadata: dict[str, Any], tensors: dict[str, tuple[np.ndarray, str] | None] | None = None
) -> None:
    """Writes metadata and raw tensors (array, type) unchanged, except those that are None."""
    writer = gguf.GGUFWriter(file, metadata.get("general.architecture", "none"))
    for key, value in metadata.items():
        if value is None:
            continue
        if key == "general.architecture":
            continue  # the writer has it
        if isinstance(value, bool):
            writer.add_bool(key, value)
        elif isinstance(value, int):
            writer.add_uint32(key, value)
        elif isinstance(value, float):
            writer.add_float32(key, value)
        elif isinstance(value, str):
            writer.add_string(key, value)
        else:
            writer.add_array(key, value)
    for name, tensor in (tensors or {}).items():
        if tensor is not None:
            array, kind = tensor
            plain = kind in ("F32", "F16")
            writer.add_tensor(name, array, raw_dtype=None if plain else Kind[kind])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
