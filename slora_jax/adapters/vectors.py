"""Turns DoRA magnitudes and biases into what a step applies: `y (1 + scale) + bias` on a projection's base output.

PEFT computes `g (W x + s B A x)` plus the biases, with `g = magnitude / norm of the rows of (W + s B A)`, 1 without
DoRA. `g` is folded into B and into the scale; every bias, into the bias.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from slora_jax.adapters.adapter import LoraAdapter
from slora_jax.adapters.ends import Vocabulary
from slora_jax.adapters.geometry import module_name
from slora_jax.errors import AdapterError

Key = tuple[int, str]


class BaseWeights(Vocabulary, Protocol):
    """The base weights that adapters are read against. Called on any thread, not inside a step."""

    def row_norms(self, layer: int, projection: str, a: np.ndarray, b: np.ndarray) -> np.ndarray:
        """The Euclidean norm of each row of `W + b a`, float32 `[d_out]`; `a` is `[r, d_in]`, `b` `[d_out, r]`."""

    def bias(self, layer: int, projection: str) -> np.ndarray | None:
        """The projection's bias, float32 `[d_out]`; None if it has none."""


@dataclass(frozen=True)
class FoldedVectors:
    """Float32 vectors `[d_out]` by key.

    Attributes:
      factor: multiplies B beside the adapter's scale.
      scale, bias: applied to the base output.
    """

    factor: Mapping[Key, np.ndarray]
    scale: Mapping[Key, np.ndarray]
    bias: Mapping[Key, np.ndarray]


def fold(adapter: LoraAdapter, base: BaseWeights) -> FoldedVectors:
    """Folds an adapter's vectors.

    Raises:
      AdapterError: the adapter has a trained bias where the base model has none.
    """
    factors: dict[Key, np.ndarray] = {}
    scales: dict[Key, np.ndarray] = {}
    biases: dict[Key, np.ndarray] = {}
    for key in sorted({key for vectors in adapter.vectors.values() for key in vectors}):
        shape, old = next(v[key].shape for v in adapter.vectors.values() if key in v), base.bias(*key)
        if key in adapter.base_biases and old is None:
            raise AdapterError(
                f"bias: the adapter has a trained bias of {module_name(*key)}, and the base model has none there; the "
                "adapter was trained on another base model"
            )
        old = np.zeros(shape, np.float32) if old is None else old
        bias = np.zeros(shape, np.float32)
        if key in adapter.lora_biases:
            bias += np.float32(adapter.scales[key]) * adapter.lora_biases[key]
        if key in adapter.base_biases:
            bias += adapter.base_biases[key] - old
        if key in adapter.magnitudes:
            with np.errstate(divide="ignore", invalid="ignore"):  # `pack_tiles` refuses what is not finite
                norms = base.row_norms(*key, adapter.a[key], np.float32(adapter.scales[key]) * adapter.b[key])
                factors[key] = adapter.magnitudes[key] / norms
            scales[key] = factors[key] - 1
            bias -= scales[key] * old
        biases[key] = bias
    return FoldedVectors(factors, scales, biases)
