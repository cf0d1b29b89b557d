"""The decoder of all families over a ragged list of tokens; `ModelConfig` says in what they differ.

The step supplies attention and the LoRA part of each projection through a `StepContext`. Projections with the same
input are fused, and every kernel is stored `[in, out]`.
"""

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Literal, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from pallas_kernels.experts.xla import gated
from pallas_kernels.weight_format import Kernels
from slora_jax.models.config import ModelConfig
from slora_jax.models.experts import ExpertLayer
from slora_jax.models.layers import Embedding, Linear, RMSNorm, model_dtype, precision_of
from slora_jax.models.rotary import Table, inverse_frequencies, rotary_tables, rotate, scaled
from slora_jax.models.traits import Activation, LayerKind

Stack = Literal["qkv", "o", "gate_up", "down"]
Params = dict[str, Any]


class StepContext(Protocol):
    """The step's operations for a layer, called during tracing, once per layer and stack, in layer order."""

    def attend(self, layer: int, q: jax.Array, k: jax.Array, v: jax.Array, window: int | None) -> jax.Array:
        """Causal attention of this step's tokens over their sequences, which include `k` and `v`; scales by
        `head_dim ** -0.5`, and limits the scores by the model's `score_cap`.

        Args:
          q: `[T, num_heads, head_dim]`, rotated, in the model's dtype like `k` and `v`.
          k: `[T, num_kv_heads, head_dim]`, rotated.
          v: `[T, num_kv_heads, head_dim]`.
          window: number of newest keys that a query attends to, its own included; None: all.

        Returns:
          `[T, num_heads, head_dim]` in the model's dtype.
        """

    def lora(self, layer: int, stack: Stack, x: jax.Array, y: jax.Array) -> jax.Array:
        """Returns `y` plus the adapters' updates, in the model's dtype.

        Args:
          x: `[T, d_in]`, the projection's input, in the model's dtype.
          y: `[T, d_out]`, its output with bias, fused like the base kernel: q|k|v for "qkv", gate|up for "gate_up".
        """

    def lookup(self, embedding: Embedding, tokens: jax.Array) -> jax.Array:
        """The embeddings `[T, d]` of `tokens` int32 `[T]`. A shard's `embedding` covers a part of the vocabulary."""

    def experts(
        self,
        layer: int,
        x: jax.Array,
        chosen: jax.Array,
        weights: jax.Array,
        gate_up: Kernels,
        down: Kernels,
        activation: Activation,
    ) -> jax.Array:
        """Returns `pallas_kernels.experts.expert_outputs` with the adapters' updates; on a shard, its part of the
        sum."""

    def reduce(self, y: jax.Array) -> jax.Array:
        """The sum over all shards of `y [T, d]`, the output of "o" or "down" with its adapters; on one device, y."""


class HeadContext(Protocol):
    """The step's operation after the head."""

    def head(self, hidden: jax.Array, logits: jax.Array) -> jax.Array:
        """Returns `logits` float32 `[..., vocab]` of `hidden` plus the adapters' changes of the head."""


def norms_of(config: ModelConfig) -> tuple[str, ...]:
    """Names of a layer's norms of width `hidden_size`, in the order of their use."""
    return {
        "before": ("input_norm", "post_attention_norm"),
        "around": ("input_norm", "attention_output_norm", "post_attention_norm", "feed_forward_output_norm"),
        "after": ("attention_output_norm", "feed_forward_output_norm"),
    }[config.norms]


class DecoderLayer(nnx.Module):
    """One transformer block: attention and feed-forward, each with norms and added to the residual.

    Args:
      kind: the kind of the layer.
      index: number of the layer in the pool of the context that it is called with.
    """

    def __init__(self, config: ModelConfig, kind: LayerKind, index: int, dtype: np.dtype):
        d, ffn, epsilon = config.hidden_size, config.intermediate_size, config.rms_norm_eps
        self.index = index
        self.kind = kind
        self.config = config
        for name in norms_of(config):
            setattr(self, name, RMSNorm(d, epsilon))
        self.qkv = Linear(d, config.q_width + 2 * config.kv_width, config.qkv_bias, dtype, config.weights)
        widths = {"head": (config.head_dim, config.head_dim), "width": (config.q_width, config.kv_width)}
        q_width, k_width = widths[config.qk_norm] if config.qk_norm else (0, 0)
        self.q_norm = RMSNorm(q_width, epsilon) if q_width else None
        self.k_norm = RMSNorm(k_width, epsilon) if k_width else None
        self.o = Linear(config.q_width, d, config.o_bias, dtype, config.weights)
        if kind.has_experts:
            self.experts = ExpertLayer(config, dtype)
        else:
            self.gate_up = Linear(d, 2 * ffn, config.mlp_bias, dtype, config.weights)
            self.down = Linear(ffn, d, config.mlp_bias, dtype, config.weights)

    def __call__(self, x: jax.Array, tables: Sequence[Table], context: StepContext) -> jax.Array:
        """Maps `x` `[T, d]` to `[T, d]`. tables: cosines and sines of each of `ModelConfig.ropes`."""
        x = self._add(x, "input_norm", lambda x: self._attention(x, tables, context), "attention_output_norm")
        feed_forward = self._experts if self.kind.has_experts else self._feed_forward
        return self._add(x, "post_attention_norm", lambda x: feed_forward(x, context), "feed_forward_output_norm")

    def _add(self, x: jax.Array, before: str, part: Callable[[jax.Array], jax.Array], after: str) -> jax.Array:
        """Adds to `x` the result of a part, with the norms before and after it that the layer has."""
        norms = norms_of(self.config)
        y = part(getattr(self, before)(x) if before in norms else x)
        y = getattr(self, after)(y) if after in norms else y
        return x + scaled(y, self.config.residual_multiplier)

    def _attention(self, x: jax.Array, tables: Sequence[Table], context: StepContext) -> jax.Array:
        config = self.config
        with jax.named_scope("qkv"):
            fused = context.lora(self.index, "qkv", x, self.qkv(x))  # [T, q_width + 2 kv_width]
            q, k, v = jnp.split(fused, (config.q_width, config.q_width + config.kv_width), axis=-1)
            if config.qk_norm == "width":
                q, k = self._normed(q, k)
            q = q.reshape(-1, config.num_heads, config.head_dim)  # [T, H, hd]
            k = k.reshape(-1, config.num_kv_heads, config.head_dim)  # [T, Hkv, hd]
            v = v.reshape(-1, config.num_kv_heads, config.head_dim)  # [T, Hkv, hd]
        with jax.named_scope("rotary"):
            if config.qk_norm == "head":
                q, k = self._normed(q, k)
            # A context scales scores by `head_dim ** -0.5`; a model's own scale is the query's.
            own = config.attention_scale
            scale = 1.0 if own is None or math.isclose(own, config.head_dim**-0.5) else own * config.head_dim**0.5
            if self.kind.rope is None:
                q = scaled(q, scale)
            else:
                table, interleaved = tables[self.kind.rope], config.ropes[self.kind.rope].interleaved
                q, k = rotate(q, table, interleaved, scale), rotate(k, table, interleaved)
        with jax.named_scope("attention"):
            mixed = context.attend(self.index, q, k, v, self.kind.window).reshape(-1, config.q_width)  # [T, q_width]
        with jax.named_scope("o"):
            return context.reduce(context.lora(self.index, "o", mixed, self.o(mixed)))  # [T, d]

    def _normed(self, q: jax.Array, k: jax.Array) -> tuple[jax.Array, jax.Array]:
        assert self.q_norm is not None and self.k_norm is not None
        return self.q_norm(q), self.k_norm(k)

    def _feed_forward(self, x: jax.Array, context: StepContext) -> jax.Array:
        with jax.named_scope("gate_up"):
            fused = context.lora(self.index, "gate_up", x, self.gate_up(x))  # [T, 2 ffn]
            hidden = gated(fused, self.config.activation, x.dtype)  # [T, ffn]
        with jax.named_scope("down"):
            return context.reduce(context.lora(self.index, "down", hidden, self.down(hidden)))  # [T, d]

    def _experts(self, x: jax.Array, context: StepContext) -> jax.Array:
        with jax.named_scope("experts"):
            return context.reduce(self.experts(x, partial(context.experts, self.index)))  # [T, d]


class Decoder(nnx.Module):
    """The whole model, or one shard's smaller model (see `parallel.layout`).

    Constructing it allocates zeros; use `abstract_decoder`, `init_random` or `load_model` instead.
    """

    def __init__(self, config: ModelConfig, dtype: Any):
        dtype = model_dtype(dtype)
        self.config = config
        self.embed = Embedding(config.vocab_size, config.hidden_size, dtype)
        self.layers = nnx.List([DecoderLayer(config, kind, i, dtype) for i, kind in enumerate(config.kinds)])
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        untied = not config.tie_word_embeddings
        self.lm_head = Linear(config.hidden_size, config.vocab_size, False, dtype) if untied else None

    def __call__(self, tokens: jax.Array, positions: jax.Array, context: StepContext) -> jax.Array:
        """Returns hidden states `[T, d]` after the final norm, in the model's dtype.

        Args:
          tokens: int32 `[T]`, the tokens of all sequences in one list; only `context` knows the sequences.
          positions: int32 `[T]`, each token's position in its own sequence, from 0.
        """
        x, tables = self.begin(tokens, positions, context)
        for layer in self.layers:
            with jax.named_scope(f"layer{layer.index}"):
                x = layer(x, tables, context)
        return self.end(x)

    def begin(
        self, tokens: jax.Array, positions: jax.Array, context: StepContext
    ) -> tuple[jax.Array, tuple[Table, ...]]:
        """Returns the first layer's inputs: embeddings `[T, d]`, and cosines and sines of each of the model's
        `ropes`."""
        config = self.config
        with jax.named_scope("embed"):
            x = context.lookup(self.embed, tokens)  # [T, d]
            if config.embedding_multiplier != 1.0:
                x = x * jnp.asarray(config.embedding_multiplier, x.dtype)  # rounded to the dtype, as Gemma was trained
            return x, tuple(
                rotary_tables(
                    positions,
                    inverse_frequencies(rope, config.head_dim, config.max_position_embeddings),
                    rope.attention_factor,
                )
                for rope in config.ropes
            )

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
                precision=precision_of(hidden.dtype),
                preferred_element_type=jnp.float32,
            )
            if context is not None:
                logits = context.head(hidden, logits)
            logits = scaled(logits, 1 / self.config.logits_scaling)
            cap = self.config.logit_cap
            return logits if cap is None else cap * jnp.tanh(logits / cap)
