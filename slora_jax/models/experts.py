"""Layers of experts: the router, and the weights of the experts."""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from pallas_kernels.weight_format import Kernels, ScaledKernels
from slora_jax.models import quantised
from slora_jax.models.config import ModelConfig
from slora_jax.models.layers import precision_of


class ExpertLayer(nnx.Module):
    """The feed-forward part of a layer with experts: a weighted sum of the outputs of a token's experts."""

    def __init__(self, config: ModelConfig, dtype: np.dtype):
        assert config.experts is not None
        experts, d = config.experts, config.hidden_size
        self.config = config
        self.router = nnx.Param(jnp.zeros((d, experts.count), dtype))
        kernels = {"gate_up": (d, 2 * experts.intermediate_size), "down": (experts.intermediate_size, d)}
        for name, shape in kernels.items():
            if config.weights is None:
                setattr(self, name, nnx.Param(jnp.zeros((experts.count, *shape), dtype)))
            else:
                codes, scale = quantised.zeros(config.weights, *shape, experts.count)
                setattr(self, name, nnx.Param(codes))
                setattr(self, f"{name}_scale", nnx.Param(scale))

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
        return outputs(x, chosen, weights, self._kernels("gate_up"), self._kernels("down"), self.config.activation)

    def _kernels(self, name: str) -> Kernels:
        kernels = getattr(self, name)[...]
        return kernels if self.config.weights is None else ScaledKernels(kernels, getattr(self, f"{name}_scale")[...])
