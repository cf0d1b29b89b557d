"""Widths of the measured base models."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from pallas_kernels.lora.layout import LoraLayout, Stack


def decoder_layout(hidden_size: int, q_width: int, kv_width: int, intermediate_size: int, page_size: int) -> LoraLayout:
    """Returns the adapter layout of a Llama-like decoder."""
    stacks = (
        Stack("qkv", ("q", "k", "v"), hidden_size, (q_width, kv_width, kv_width)),
        Stack("o", ("o",), q_width, (hidden_size,)),
        Stack("gate_up", ("gate", "up"), hidden_size, (intermediate_size, intermediate_size)),
        Stack("down", ("down",), intermediate_size, (hidden_size,)),
    )
    return LoraLayout(stacks, page_size, kv_width)


@dataclass(frozen=True)
class Model:
    """Widths of a Llama-like decoder."""

    name: str
    hidden: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    ffn: int
    num_layers: int
    vocab: int
    max_tokens: int

    @property
    def width(self) -> int:
        """The pool's W."""
        return self.num_kv_heads * self.head_dim

    def layout(self, page_size: int = 16) -> LoraLayout:
        return decoder_layout(self.hidden, self.num_heads * self.head_dim, self.width, self.ffn, page_size)

    def config(self) -> dict[str, Any]:
        """The model's Hugging Face `config.json`."""
        return {
            "model_type": "llama",
            "vocab_size": self.vocab,
            "hidden_size": self.hidden,
            "intermediate_size": self.ffn,
            "num_hidden_layers": self.num_layers,
            "num_attention_heads": self.num_heads,
            "num_key_value_heads": self.num_kv_heads,
            "head_dim": self.head_dim,
            "max_position_embeddings": self.max_tokens,
            "rms_norm_eps": 1e-5,
            "rope_theta": 500000.0,
            "tie_word_embeddings": False,
        }


LLAMA_3_8B = Model("llama-3-8b", 4096, 32, 8, 128, 14336, 32, 128256, 8192)
LLAMA_7B = Model("llama-7b", 4096, 32, 32, 128, 11008, 32, 32000, 4096)
TINY = Model("tiny", 32, 4, 2, 16, 64, 2, 64, 64)
TINY_MHA = Model("tiny-mha", 32, 2, 2, 16, 32, 2, 64, 64)
