"""Checks answers with merged weights in NumPy, one request at a time, sharing no code with the engine.

Weights are read from the model's files (`demo.reference_weights`), the adapter is merged as `W + (alpha / r) B A`, and
the model is a dense Llama forward pass without cache, pages or batching.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from safetensors.numpy import load_file

Weights = dict[str, np.ndarray]
ROUNDING = 1e-5
"""Logits that differ by less than this share of the largest are a tie, which float32 rounding decides..."""
LARGEST_TIE = 1e-4
"""...unless they differ by more than this."""


@dataclass(frozen=True)
class Difference:
    """The first difference between an answer and the merged model's.

    Attributes:
      position: index in the answer, from 0.
      token: the answer's token; None: the answer ends here.
      expected: the merged model's token; None: the answer should have ended here.
    """

    position: int
    token: int | None
    expected: int | None


def load_weights(file: Path) -> Weights:
    """Reads the tensors of a safetensors file as float64, by name."""
    return {name: tensor.astype(np.float64) for name, tensor in load_file(file).items()}


def merge(base: Weights, adapter_dir: Path) -> Weights:
    """Returns the base model's weights with an adapter's update added."""
    alpha = json.loads((adapter_dir / "adapter_config.json").read_text())["lora_alpha"]
    lora = load_weights(adapter_dir / "adapter_model.safetensors")
    merged = dict(base)
    for name, a in lora.items():
        if name.endswith(".lora_A.weight"):
            b = lora[name.replace(".lora_A.", ".lora_B.")]
            target = name.removeprefix("base_model.model.").replace(".lora_A.", ".")
            kernel = base[target]
            merged[target] = kernel + (alpha / len(a) * b).astype(kernel.dtype) @ a.astype(kernel.dtype)
    return merged


def dense_logits(weights: Weights, config: dict, tokens: Sequence[int], first: int = 0) -> np.ndarray:
    """Returns logits `[T - first, vocab]` after each of the T `tokens` from index `first`, in the weights' dtype.

    Args:
      config: fields of a config.json.
    """
    embedding = weights["model.embed_tokens.weight"]
    heads, kv_heads = config["num_attention_heads"], config["num_key_value_heads"]
    length, head_dim = len(tokens), config.get("head_dim") or config["hidden_size"] // heads
    frequency = config["rope_theta"] ** (-np.arange(0, head_dim, 2) / head_dim)
    angle = np.arange(length)[:, None, None] * frequency  # [T, 1, head_dim / 2]
    cos, sin = np.cos(angle).astype(embedding.dtype), np.sin(angle).astype(embedding.dtype)
    future = np.triu(np.full((length, length), -np.inf, embedding.dtype), 1)

    def norm(x: np.ndarray, name: str) -> np.ndarray:
        return x / np.sqrt(np.mean(x * x, -1, keepdims=True) + config["rms_norm_eps"]) * weights[f"{name}.weight"]

    def split_heads(x: np.ndarray, count: int) -> np.ndarray:
        return x.reshape(length, count, head_dim)

    def rotate(x: np.ndarray) -> np.ndarray:
        left, right = np.split(x, 2, axis=-1)
        return np.concatenate([left * cos - right * sin, right * cos + left * sin], -1)

    x = embedding[list(tokens)]
    for layer in range(config["num_hidden_layers"]):
        prefix = f"model.layers.{layer}"

        def linear(x: np.ndarray, name: str, prefix: str = prefix) -> np.ndarray:
            return x @ weights[f"{prefix}.{name}.weight"].T

        h = norm(x, f"{prefix}.input_layernorm")
        q = rotate(split_heads(linear(h, "self_attn.q_proj"), heads))
        k = rotate(split_heads(linear(h, "self_attn.k_proj"), kv_heads)).repeat(heads // kv_heads, axis=1)
        v = split_heads(linear(h, "self_attn.v_proj"), kv_heads).repeat(heads // kv_heads, axis=1)
        scores = np.einsum("qhd,khd->hqk", q, k) / math.sqrt(head_dim) + future
        scores = np.exp(scores - scores.max(-1, keepdims=True))
        mixed = np.einsum("hqk,khd->qhd", scores / scores.sum(-1, keepdims=True), v)
        x = x + linear(mixed.reshape(length, -1), "self_attn.o_proj")

        h = norm(x, f"{prefix}.post_attention_layernorm")
        gate, up = linear(h, "mlp.gate_proj"), linear(h, "mlp.up_proj")
        x = x + linear(gate / (1 + np.exp(-gate)) * up, "mlp.down_proj")
    return norm(x[first:], "model.norm") @ weights["lm_head.weight"].T


def first_difference(
    weights: Weights, config: dict, prompt: Sequence[int], answer: Sequence[int], max_tokens: int
) -> Difference | None:
    """Returns the first difference between `answer` and the dense model's greedy answer to `prompt`; None if equal.

    One pass over prompt and answer suffices: an answer is greedy if each token is the most likely after its prefix.
    """
    ends = np.atleast_1d(config["eos_token_id"])
    logits = dense_logits(weights, config, [*prompt, *answer], first=len(prompt) - 1)
    for position, (row, token) in enumerate(zip(logits[:-1], answer, strict=True)):
        if position and answer[position - 1] in ends:
            return Difference(position, token, None)
        if row[token] < row.max() - min(ROUNDING * np.abs(row).max(), LARGEST_TIE):
            return Difference(position, token, int(row.argmax()))
    ended = len(answer) == max_tokens or (len(answer) > 0 and answer[-1] in ends)
    return None if ended else Difference(len(answer), None, int(logits[-1].argmax()))
