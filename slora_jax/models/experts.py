"""Layers of experts: the router, and the weights of the experts."""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from slora_jax.models.config import ModelConfig
from slora_jax.models.layers import precision_of


class ExpertLayer(nnx.Module):
    """The feed-forward part of a layer with experts: a weighted sum of the outputs of a token's experts."""

    def __init__(self, config: ModelConfig, dtype: np.dtype):
        assert config.experts is not None
        experts, d = config.experts, config.hidden_size
        self.config = config
        self.router = nnx.Param(jnp.zeros((d, experts.count), dtype))
        self.gate_up = nnx.Param(jnp.zeros((experts.count, d, 2 * experts.intermediate_size), dtype))
        self.down = nnx.Param(jnp.zeros((experts.count, experts.intermediate_size, d), dtype))

    def __call__(self, x: jax.Array, outputs: Callable[..., jax.Array]) -> jax.Array:
        """Maps `x` `[T, d]` to `[T, d]`; on a shard, to its part of the sum. outputs: `StepContext.experts` of
        this layer."""
        experts = self.config.experts
        assert experts is not None
        with jax.named_scope("router"):
            scores = jnp.dot(x, self.router[...], precision=precision_of(x.dtype))  # [T, E]
            weights, chosen = jax.lax.top_k(jax.nn.softmax(scores.astype(jnp.float32), -1), experts.per_token)
            if experts.normalised:
                weights = weights / weights.sum(-1, keepdims=True)  # [T, k]
        return outputs(x, chosen, weights, self.gate_up[...], self.down[...], self.config.activation)
