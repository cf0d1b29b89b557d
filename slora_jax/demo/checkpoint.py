"""Writes a small Llama checkpoint in Hugging Face format, with random weights and its own tokenizer, without torch."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

from slora_jax.demo.corpus import SENTENCES

BOS, EOS = "<|begin_of_text|>", "<|end_of_text|>"
CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}{{ message['role'] }}: {{ message['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)
MAX_VOCAB = 2048
MAX_POSITIONS = 512


@dataclass(frozen=True)
class Widths:
    """Widths of the model's hidden states and feed-forward layers, and its numbers of heads."""

    hidden: int = 256
    heads: int = 8
    kv_heads: int = 4
    ffn: int = 688


def write_checkpoint(directory: Path, num_layers: int, seed: int, widths: Widths | None = None) -> int:
    """Writes config, tokenizer and float32 weights to `directory`. Returns the number of parameters."""
    widths = widths or Widths()
    directory.mkdir(parents=True, exist_ok=True)
    vocab = _write_tokenizer(directory)
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_act": "silu",
        "hidden_size": widths.hidden,
        "intermediate_size": widths.ffn,
        "num_hidden_layers": num_layers,
        "num_attention_heads": widths.heads,
        "num_key_value_heads": widths.kv_heads,
        "vocab_size": vocab,
        "max_position_embeddings": MAX_POSITIONS,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "tie_word_embeddings": False,
        "bos_token_id": 0,
        "eos_token_id": 1,
        "torch_dtype": "float32",
    }
    _write_json(directory / "config.json", config)
    _write_json(directory / "generation_config.json", {"bos_token_id": 0, "eos_token_id": 1})
    weights = _random_weights(num_layers, widths, vocab, seed)
    save_file(weights, directory / "model.safetensors", metadata={"format": "pt"})
    return sum(weight.size for weight in weights.values())


def _random_weights(num_layers: int, widths: Widths, vocab: int, seed: int) -> dict[str, np.ndarray]:
    """Draws kernels `[out, in]` from N(0, 1 / in) and embeddings from N(0, 1); norm scales are 1."""
    rng = np.random.default_rng(seed)
    hidden, ffn = widths.hidden, widths.ffn
    kv = widths.kv_heads * hidden // widths.heads
    kernels = {
        "self_attn.q_proj": (hidden, hidden),
        "self_attn.k_proj": (kv, hidden),
        "self_attn.v_proj": (kv, hidden),
        "self_attn.o_proj": (hidden, hidden),
        "mlp.gate_proj": (ffn, hidden),
        "mlp.up_proj": (ffn, hidden),
        "mlp.down_proj": (hidden, ffn),
    }
    weights = {"model.embed_tokens.weight": rng.standard_normal((vocab, hidden), np.float32)}
    for layer in range(num_layers):
        for name, shape in kernels.items():
            weights[f"model.layers.{layer}.{name}.weight"] = _kernel(rng, shape)
        for name in ("input_layernorm", "post_attention_layernorm"):
            weights[f"model.layers.{layer}.{name}.weight"] = np.ones(hidden, np.float32)
    weights["model.norm.weight"] = np.ones(hidden, np.float32)
    weights["lm_head.weight"] = _kernel(rng, (vocab, hidden))
    return weights


def _kernel(rng: np.random.Generator, shape: tuple[int, int]) -> np.ndarray:
    return rng.standard_normal(shape, np.float32) / np.float32(np.sqrt(shape[1]))


def _write_tokenizer(directory: Path) -> int:
    """Trains a byte-level BPE tokenizer that begins every text with BOS. Returns the size of its vocabulary."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=MAX_VOCAB,
        special_tokens=[BOS, EOS],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(SENTENCES, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", pair=f"{BOS} $A {BOS} $B", special_tokens=[(BOS, 0)]
    )
    tokenizer.save(str(directory / "tokenizer.json"))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": BOS, "eos_token": EOS}
    settings |= {"chat_template": CHAT_TEMPLATE}
    _write_json(directory / "tokenizer_config.json", settings | {"model_max_length": MAX_POSITIONS})
    return tokenizer.get_vocab_size()


def _write_json(path: Path, content: dict) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
