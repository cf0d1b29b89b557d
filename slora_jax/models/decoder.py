"""The decoder of Llama, Mistral, Qwen2 and Qwen3 over a ragged list of tokens.

The step supplies attention and the LoRA part of each projection through a `StepContext`. Projections with the same
input are fused, and every kernel is stored `[in, out]`.
"""

from typing import Any, Literal, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from slora_jax.errors import UnsupportedModelError
from slora_jax.models.config import ModelConfig
from slora_jax.models.rotary import inverse_frequencies, rotary_tables, rotate

Stack = Literal["qkv", "o", "gate_up", "down"]
Params = dict[str, Any]


class StepContext(Protocol):
    """The step's operations for a layer, called during tracing, once per layer and stack, in layer order."""

    def attend(self, layer: int, q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
        """Causal attention of this step's tokens over their sequences, which include `k` and `v`; scales by
        `head_dim ** -0.5`.

        Args:
          q: `[T, num_heads, head_dim]`, rotated, in the model's dtype like `k` and `v`.
          k: `[T, num_kv_heads, head_dim]`, rotated.
          v: `[T, num_kv_heads, head_dim]`.

        Returns:
          `[T, num_heads, head_dim]` in the model's dtype.
        """

    def lora(self, layer: int, stack: Stack, x: jax.Array, y: jax.Array) -> jax.Array:
        """Returns `y` plus the adapters' updates, in the model's dtype.

        Args:
          x: `[T, d_in]`, the projection's input, in the model's dtype.
          y: `[T, d_out]`, its output with bias, fused like the base kernel: q|k|v for "qkv", gate|up for "gate_up".
        """

    def lookup(self, embedding: "Embedding", tokens: jax.Array) -> jax.Array:
        """The embeddings `[T, d]` of `tokens` int32 `[T]`. A shard's `embedding` covers a part of the vocabulary."""

    def reduce(self, y: jax.Array) -> jax.Array:
        """The sum over all shards of `y [T, d]`, the output of "o" or "down" with its adapters; on one device, y."""


class HeadContext(Protocol):
    """The step's operation after the head."""

    def head(self, hidden: jax.Array, logits: jax.Array) -> jax.Array:
        """Returns `logits` float32 `[..., vocab]` of `hidden` plus the adapters' changes of the head."""


def model_dtype(dtype: Any) -> np.dtype:
    """The NumPy dtype of "float32" or "bfloat16" (name or dtype); others raise `UnsupportedModelError`."""
    try:
        name = jnp.dtype(dtype).name
    except TypeError:
        name = str(dtype)
    if name not in ("float32", "bfloat16"):
        raise UnsupportedModelError(f'dtype={name!r} is not supported; supported: "float32", "bfloat16"')
    return jnp.dtype(name)


def _precision(dtype: np.dtype) -> jax.lax.Precision | None:
    """Full precision for float32, where a GPU's default would be TF32."""
    return jax.lax.Precision.HIGHEST if dtype == jnp.float32 else None


class Linear(nnx.Module):
    """`x @ kernel (+ bias)`, kernel `[in, out]`, bias `[out]`."""

    def __init__(self, in_features: int, out_features: int, bias: bool, dtype: np.dtype):
        self.kernel = nnx.Param(jnp.zeros((in_features, out_features), dtype))
        self.bias = nnx.Param(jnp.zeros((out_features,), dtype)) if bias else None

    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps `x` `[T, in]` to `[T, out]` of the same dtype."""
        y = jnp.dot(x, self.kernel[...], precision=_precision(x.dtype))
        return y if self.bias is None else y + self.bias[...]


class RMSNorm(nnx.Module):
    """Root-mean-square norm over the last axis, with float32 scale and arithmetic; returns the input's dtype."""

    def __init__(self, features: int, epsilon: float):
        self.scale = nnx.Param(jnp.ones((features,), jnp.float32))
        self.epsilon = epsilon

    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps `x` `[..., features]` to the same shape and dtype."""
        wide = x.astype(jnp.float32)
        inverse = jax.lax.rsqrt(jnp.mean(wide * wide, axis=-1, keepdims=True) + self.epsilon)
        return (wide * inverse * self.scale[...]).astype(x.dtype)


class DecoderLayer(nnx.Module):
    """One transformer block: attention and gated feed-forward, each behind a norm and added to the residual."""

    def __init__(self, config: ModelConfig, index: int, dtype: np.dtype):
        d, ffn, epsilon = config.hidden_size, config.intermediate_size, config.rms_norm_eps
        self.index = index
        self.config = config
        self.input_norm = RMSNorm(d, epsilon)
        self.qkv = Linear(d, config.q_width + 2 * config.kv_width, config.qkv_bias, dtype)
        self.q_norm = RMSNorm(config.head_dim, epsilon) if config.qk_norm else None
        self.k_norm = RMSNorm(config.head_dim, epsilon) if config.qk_norm else None
        self.o = Linear(config.q_width, d, config.o_bias, dtype)
        self.post_attention_norm = RMSNorm(d, epsilon)
        self.gate_up = Linear(d, 2 * ffn, config.mlp_bias, dtype)
        self.down = Linear(ffn, d, config.mlp_bias, dtype)

    def __call__(self, x: jax.Array, cos: jax.Array, sin: jax.Array, context: StepContext) -> jax.Array:
        """Maps `x` `[T, d]` to `[T, d]`; `cos` and `sin` are float32 `[T, 1, head_dim / 2]`."""
        x = x + self._attention(self.input_norm(x), cos, sin, context)
        return x + self._feed_forward(self.post_attention_norm(x), context)

    def _attention(self, x: jax.Array, cos: jax.Array, sin: jax.Array, context: StepContext) -> jax.Array:
        config = self.config
        with jax.named_scope("qkv"):
            fused = context.lora(self.index, "qkv", x, self.qkv(x))  # [T, q_width + 2 kv_width]
            q, k, v = jnp.split(fused, (config.q_width, config.q_width + config.kv_width), axis=-1)
            q = q.reshape(-1, config.num_heads, config.head_dim)  # [T, H, hd]
            k = k.reshape(-1, config.num_kv_heads, config.head_dim)  # [T, Hkv, hd]
            v = v.reshape(-1, config.num_kv_heads, config.head_dim)  # [T, Hkv, hd]
        with jax.named_scope("rotary"):
            if self.q_norm is not None and self.k_norm is not None:
                q, k = self.q_norm(q), self.k_norm(k)
            q, k = rotate(q, cos, sin), rotate(k, cos, sin)
        with jax.named_scope("attention"):
            mixed = context.attend(self.index, q, k, v).reshape(-1, config.q_width)  # [T, q_width]
        with jax.named_scope("o"):
            return context.reduce(context.lora(self.index, "o", mixed, self.o(mixed)))  # [T, d]

    def _feed_forward(self, x: jax.Array, context: StepContext) -> jax.Array:
        with jax.named_scope("gate_up"):
            fused = context.lora(self.index, "gate_up", x, self.gate_up(x))  # [T, 2 ffn]
            gate, up = jnp.split(fused.astype(jnp.float32), 2, axis=-1)
            hidden = (jax.nn.silu(gate) * up).astype(x.dtype)  # [T, ffn]
        with jax.named_scope("down"):
            return context.reduce(context.lora(self.index, "down", hidden, self.down(hidden)))  # [T, d]


class Embedding(nnx.Module):
    """Token embedding `[vocab, d]`."""

    def __init__(self, vocab_size: int, features: int, dtype: np.dtype):
        self.embedding = nnx.Param(jnp.zeros((vocab_size, features), dtype))

    def __call__(self, tokens: jax.Array) -> jax.Array:
        """Maps int32 `[T]` to `[T, d]`; an id out of range (padding) reads the nearest row."""
        return jnp.take(self.embedding[...], tokens, axis=0, mode="clip")


class Decoder(nnx.Module):
    """The whole model, or one shard's smaller model (see `parallel.layout`).

    Constructing it allocates zeros; use `abstract_decoder`, `init_random` or `load_model` instead.
    """

    def __init__(self, config: ModelConfig, dtype: Any):
        dtype = model_dtype(dtype)
        self.config = config
        self.embed = Embedding(config.vocab_size, config.hidden_size, dtype)
        self.layers = nnx.List([DecoderLayer(config, index, dtype) for index in range(config.num_layers)])
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        untied = not config.tie_word_embeddings
        self.lm_head = Linear(config.hidden_size, config.vocab_size, False, dtype) if untied else None

    def __call__(self, tokens: jax.Array, positions: jax.Array, context: StepContext) -> jax.Array:
        """Returns hidden states `[T, d]` after the final norm, in the model's dtype.

        Args:
          tokens: int32 `[T]`, the tokens of all sequences in one list; only `context` knows the sequences.
          positions: int32 `[T]`, each token's position in its own sequence, from 0.
        """
        x, cos, sin = self.begin(tokens, positions, context)
        for layer in self.layers:
            with jax.named_scope(f"layer{layer.index}"):
                x = layer(x, cos, sin, context)
        return self.end(x)

    def begin(
        self, tokens: jax.Array, positions: jax.Array, context: StepContext
    ) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Returns the first layer's inputs: embeddings `[T, d]`, cosines and sines `[T, 1, head_dim / 2]`."""
        with jax.named_scope("embed"):
            x = context.lookup(self.embed, tokens)  # [T, d]
            return x, *rotary_tables(positions, inverse_frequencies(self.config.rope, self.config.head_dim))

    def end(self, x: jax.Array) -> jax.Array:
        """Applies the final norm to the last layer's output `[T, d]`."""
        with jax.named_scope("norm"):
            return self.norm(x)

    def logits(self, hidden: jax.Array, context: HeadContext | None = None) -> jax.Array:
        """Maps `hidden` `[..., d]` to float32 logits `[..., vocab]`, with what adapters change of the head."""
        with jax.named_scope("logits"):
            if self.lm_head is None:
                kernel, contracted = self.embed.embedding[...], 1  # [vocab, d]
            else:
                kernel, contracted = self.lm_head.kernel[...], 0  # [d, vocab]
            logits = jax.lax.dot_general(
                hidden,
                kernel,
                (((hidden.ndim - 1,), (contracted,)), ((), ())),
                precision=_precision(hidden.dtype),
                preferred_element_type=jnp.float32,
            )
            return logits if context is None else context.head(hidden, logits)
