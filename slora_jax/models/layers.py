"""Parts of which a decoder is made. Kernels are stored `[in, out]`."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from slora_jax.errors import UnsupportedModelError
from slora_jax.models import quantised
from slora_jax.models.traits import WeightFormat


def model_dtype(dtype: Any) -> np.dtype:
    """The NumPy dtype of "float32" or "bfloat16" (name or dtype); others raise `UnsupportedModelError`."""
    try:
        name = jnp.dtype(dtype).name
    except TypeError:
        name = str(dtype)
    if name not in ("float32", "bfloat16"):
        raise UnsupportedModelError(f'dtype={name!r} is not supported; supported: "float32", "bfloat16"')
    return jnp.dtype(name)


def precision_of(dtype: np.dtype) -> jax.lax.Precision | None:
    """Full precision for float32, where a GPU's default would be TF32."""
    return jax.lax.Precision.HIGHEST if dtype == jnp.float32 else None


class Linear(nnx.Module):
    """`x @ kernel (+ bias)`, kernel `[in, out]`, bias `[out]`.

    Args:
      weights: format of the kernel, which then has a `scale` too (`models.quantised`); None: `dtype`.
    """

    def __init__(
        self, in_features: int, out_features: int, bias: bool, dtype: np.dtype, weights: WeightFormat | None = None
    ):
        self.weights = weights
        if weights is None:
            self.kernel = nnx.Param(jnp.zeros((in_features, out_features), dtype))
        else:
            self.kernel, self.scale = map(nnx.Param, quantised.zeros(weights, in_features, out_features))
        self.bias = nnx.Param(jnp.zeros((out_features,), dtype)) if bias else None

    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps `x` `[T, in]` to `[T, out]` of the same dtype."""
        precision = precision_of(x.dtype)
        if self.weights is None:
            y = jnp.dot(x, self.kernel[...], precision=precision)
        else:
            y = quantised.product(x, self.kernel[...], self.scale[...], self.weights, precision)
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


class Embedding(nnx.Module):
    """Token embedding `[vocab, d]`."""

    def __init__(self, vocab_size: int, features: int, dtype: np.dtype):
        self.embedding = nnx.Param(jnp.zeros((vocab_size, features), dtype))

    def __call__(self, tokens: jax.Array) -> jax.Array:
        """Maps int32 `[T]` to `[T, d]`; an id out of range (padding) reads the nearest row."""
        return jnp.take(self.embedding[...], tokens, axis=0, mode="clip")
