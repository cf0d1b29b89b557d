"""One LoRA adapter in host memory, as matrices: what the PEFT reader gives and the tile packer takes."""

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

    `a[key]` is `[r, d_in]` and `b[key]` is `[d_out, r]`, both float32; `ranks [num_layers, 7]` is int32, 0 where a
    projection (in the order of `PROJECTIONS`) is not adapted. `config` says how PEFT would describe the same adapter.
    """

    config: LoraConfig
    a: Mapping[tuple[int, str], np.ndarray]
    b: Mapping[tuple[int, str], np.ndarray]
    scales: Mapping[tuple[int, str], float]
    ranks: np.ndarray

    @cached_property
    def digest(self) -> str:
        """SHA-256 (hex) of what determines the computation: the adapted projections, their ranks, scales and weights.

        Names, paths, storage precision and config fields that resolve to the same adapter make no difference.
        """
        digest = hashlib.sha256(b"slora-jax adapter 1")
        for key in sorted(self.a):
            a, b = self.a[key], self.b[key]
            digest.update(f"\n{key} {a.shape} {b.shape} {float(self.scales[key]).hex()}\n".encode())
            digest.update(np.ascontiguousarray(a, np.float32).data)
            digest.update(np.ascontiguousarray(b, np.float32).data)
        return digest.hexdigest()

    def check(self, geometry: BaseGeometry) -> None:
        """Raises AdapterError unless every matrix has the shape that `ranks` and the base model's widths demand."""
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
