"""Dense float64 logits of a Llama with an adapter merged into its weights; shares no code with the engine."""

import math

import jax
import numpy as np

from pallas_kernels.lora.layout import PROJECTIONS
from slora_jax.adapters import LoraAdapter
from slora_jax.models import ModelConfig, Params


def dense_logits(model: ModelConfig, params: Params, ids: list[int], adapter: LoraAdapter | None = None) -> np.ndarray:
    """Float64 logits `[len(ids), vocab]` of a plain Llama with the adapter merged into its weights."""
    kernels = _merged(model, params, adapter)
    heads, kv_heads, width = model.num_heads, model.num_kv_heads, model.head_dim
    tokens = len(ids)
    frequency = model.rope.theta ** -(np.arange(0, width, 2) / width)
    angle = np.arange(tokens)[:, None, None] * frequency  # [T, 1, head_dim / 2]

    def norm(x: np.ndarray, scale: jax.Array) -> np.ndarray:
        return x / np.sqrt((x * x).mean(-1, keepdims=True) + model.rms_norm_eps) * np.asarray(scale, np.float64)

    def rotate(x: np.ndarray) -> np.ndarray:
        a, b = np.split(x, 2, -1)
        return np.concatenate([a * np.cos(angle) - b * np.sin(angle), b * np.cos(angle) + a * np.sin(angle)], -1)

    x = np.asarray(params["embed"]["embedding"], np.float64)[ids]
    for index in range(model.num_layers):
        layer = params["layers"][index]
        h = norm(x, layer["input_norm"]["scale"]) @ kernels[index, "qkv"]
        q, k, v = np.split(h, (model.q_width, model.q_width + model.kv_width), -1)
        q, k = rotate(q.reshape(tokens, heads, width)), rotate(k.reshape(tokens, kv_heads, width))
        k = np.repeat(k, heads // kv_heads, 1)
        v = np.repeat(v.reshape(tokens, kv_heads, width), heads // kv_heads, 1)
        scores = np.einsum("thd,shd->hts", q, k) / math.sqrt(width)
        scores = np.where(np.tri(tokens, dtype=bool), scores, -np.inf)
        weights = np.exp(scores - scores.max(-1, keepdims=True))
        mixed = np.einsum("hts,shd->thd", weights / weights.sum(-1, keepdims=True), v)
        x = x + mixed.reshape(tokens, -1) @ kernels[index, "o"]
        gate, up = np.split(norm(x, layer["post_attention_norm"]["scale"]) @ kernels[index, "gate_up"], 2, -1)
        x = x + (gate / (1 + np.exp(-gate)) * up) @ kernels[index, "down"]
    return norm(x, params["norm"]["scale"]) @ np.asarray(params["lm_head"]["kernel"], np.float64)


def _merged(model: ModelConfig, params: Params, adapter: LoraAdapter | None) -> dict[tuple[int, str], np.ndarray]:
    """Every fused kernel `[in, out]`, float64, with `scale * (B A)^T` added to its projections' columns."""
    layers = params["layers"]
    kernels = {
        (index, stack): np.array(layers[index][stack]["kernel"], np.float64)
        for index in range(model.num_layers)
        for stack in ("qkv", "o", "gate_up", "down")
    }
    q, kv, ffn, d = model.q_width, model.kv_width, model.intermediate_size, model.hidden_size
    columns = dict(
        zip(
            PROJECTIONS,
            (
                ("qkv", 0, q),
                ("qkv", q, kv),
                ("qkv", q + kv, kv),
                ("o", 0, d),
                ("gate_up", 0, ffn),
                ("gate_up", ffn, ffn),
                ("down", 0, d),
            ),
            strict=True,
        )
    )
    for (layer, projection), a in (adapter.a if adapter else {}).items():
        stack, first, count = columns[projection]
        delta = adapter.scales[layer, projection] * (adapter.b[layer, projection].astype(np.float64) @ a)  # type: ignore[union-attr]
        kernels[layer, stack][:, first : first + count] += delta.T
    return kernels
