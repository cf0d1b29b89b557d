"""One LoRA adapter as matrices in host memory: the PEFT reader's output and the tile packer's input."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from pallas_kernels.lora.layout import PROJECTIONS
from slora_jax.adapters.config import MAX_RANK, LoraConfig
from slora_jax.adapters.geometry import BaseGeometry, module_name
from slora_jax.errors import AdapterError


@dataclass(frozen=True, eq=False)
class LoraAdapter:
    """Low-rank updates `y += scales[key] * b[key] @ (a[key] @ x)`; `key` is `(layer, projection)`.

    Attributes:
      config: the same adapter in PEFT's terms.
      a: `[r, d_in]` float32 by key.
      b: `[d_out, r]` float32 by key.
      scales: factor of the update by key.
      ranks: `[num_layers, 7]` int32 in the order of `PROJECTIONS`; 0 where a projection is not adapted.
    """

    config: LoraConfig
    a: Mapping[tuple[int, str], np.ndarray]
    b: Mapping[tuple[int, str], np.ndarray]
    scales: Mapping[tuple[int, str], float]
    ranks: np.ndarray

    @cached_property
    def digest(self) -> str:
        """SHA-256 (hex) of everything that determines the computation: adapted projections, ranks, scales, weights.

        It does not depend on names, paths, storage precision, or how the config expresses the same adapter.
        """
        digest = hashlib.sha256(b"slora-jax adapter 1")
        for key in sorted(self.a):
            a, b = self.a[key], self.b[key]
            digest.update(f"\n{key} {a.shape} {b.shape} {float(self.scales[key]).hex()}\n".encode())
            digest.update(np.ascontiguousarray(a, np.float32).data)
            digest.update(np.ascontiguousarray(b, np.float32).data)
        return digest.hexdigest()

    def check(self, geometry: BaseGeometry) -> None:
        """Raises AdapterError unless every matrix has the shape that `ranks` and the base model's widths require."""
        if self.ranks.shape != (geometry.num_layers, len(PROJECTIONS)):
            raise AdapterError(
                f"ranks: expected {[geometry.num_layers, len(PROJECTIONS)]}, found {[*self.ranks.shape]}"
            )
        expected = {}
        for layer, index in zip(*np.nonzero(self.ranks), strict=True):
            expected[int(layer), PROJECTIONS[index]] = int(self.ranks[layer, index])
        if not expected or not expected.keys() == self.a.keys() == self.b.keys() == self.scales.keys():
            raise AdapterError("a, b, scales and ranks must name the same projections, at least one")
        for key, rank in expected.items():
            if not 1 <= rank <= MAX_RANK:
                raise AdapterError(f"{module_name(*key)}: rank must be in 1..{MAX_RANK}, found {rank}")
            d_in, d_out = geometry.dims(key[1])
            for name, matrix, shape in (("a", self.a[key], (rank, d_in)), ("b", self.b[key], (d_out, rank))):
                if matrix.shape != shape:
                    raise AdapterError(
                        f"{module_name(*key)}: {name} expected {[*shape]}, found {[*matrix.shape]}; "
                        "the adapter was probably made for another base model"
                    )
