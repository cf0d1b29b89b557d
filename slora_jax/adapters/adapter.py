"""One LoRA adapter as matrices in host memory: the PEFT reader's output and the tile packer's input."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np

from pallas_kernels.lora.layout import ENDS, EXPERT_PROJECTIONS, PROJECTIONS
from slora_jax.adapters.config import MAX_RANK, LoraConfig
from slora_jax.adapters.geometry import BaseGeometry, module_name
from slora_jax.errors import AdapterError

ExpertKey = tuple[int, str, int]
"""Layer, projection ("gate", "up" or "down") and expert."""


@dataclass(frozen=True, eq=False)
class LoraAdapter:
    """Low-rank updates `y += scales[key] * b[key] @ (a[key] @ x)`; `key` is `(layer, projection)`.

    `magnitudes`, `lora_biases` and `base_biases` are vectors `[d_out]`, float32, by key. They are empty in plain LoRA.

    Attributes:
      config: the same adapter in PEFT's terms.
      a: `[r, d_in]` float32 by key.
      b: `[d_out, r]` float32 by key.
      scales: factor of the update by key.
      ranks: `[num_layers, 7]` int32 in the order of `PROJECTIONS`; 0 where a projection is not adapted.
      magnitudes: DoRA's norms of the rows of `W + scale * b a`.
      lora_biases: biases of B, which the scale multiplies too.
      base_biases: trained biases that replace the base model's, also of projections without LoRA.
      ends: LoRA on the output head and the token embedding (`pallas_kernels.lora.layout.ENDS`), by name: A `[r, d]` and
        scaled B `[vocab, r]` of the head, A `[r, vocab]` and scaled B `[d, r]` of the embedding.
      experts: LoRA on gate, up and down of experts: A `[r, d_in]` and scaled B `[d_out, r]` by `(layer, projection,
        expert)`.
      expert_ranks: `[num_layers, E, 3]` int32 in the order of `EXPERT_PROJECTIONS`; None without LoRA on experts.
    """

    config: LoraConfig
    a: Mapping[tuple[int, str], np.ndarray]
    b: Mapping[tuple[int, str], np.ndarray]
    scales: Mapping[tuple[int, str], float]
    ranks: np.ndarray
    magnitudes: Mapping[tuple[int, str], np.ndarray] = field(default_factory=dict)
    lora_biases: Mapping[tuple[int, str], np.ndarray] = field(default_factory=dict)
    base_biases: Mapping[tuple[int, str], np.ndarray] = field(default_factory=dict)
    ends: Mapping[str, tuple[np.ndarray, np.ndarray]] = field(default_factory=dict)
    experts: Mapping[ExpertKey, tuple[np.ndarray, np.ndarray]] = field(default_factory=dict)
    expert_ranks: np.ndarray | None = None

    @property
    def vectors(self) -> dict[str, Mapping[tuple[int, str], np.ndarray]]:
        """The kinds of vectors that the adapter has, by the PEFT field that switches them on."""
        kinds = {"use_dora": self.magnitudes, "lora_bias": self.lora_biases, "bias": self.base_biases}
        return {field: vectors for field, vectors in kinds.items() if vectors}

    @property
    def layout_ranks(self) -> np.ndarray:
        """`ranks`, as `[num_layers, 10]` if the adapter is more than plain LoRA (`pallas_kernels.lora.layout`), and as
        `[num_layers, 10 + 3 E]` with LoRA on experts."""
        if not self.extras:
            return self.ranks
        ends = {name: a.shape[0] for name, (a, _) in self.ends.items()}
        return extended(self.ranks, bool(self.vectors), ends, self.expert_ranks)

    @property
    def extras(self) -> tuple[str, ...]:
        """Names the parts beyond plain LoRA, for example `("use_dora", "head")`."""
        return (*self.vectors, *self.ends, *(("experts",) if self.experts else ()))

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
        for kind, vectors in self.vectors.items():
            for key in sorted(vectors):
                digest.update(f"\n{kind} {key} {vectors[key].shape}\n".encode())
                digest.update(np.ascontiguousarray(vectors[key], np.float32).data)
        if self.config.alora_invocation_tokens:
            digest.update(f"\ninvocation {self.config.alora_invocation_tokens}\n".encode())
        for name in sorted(self.ends):
            for matrix in self.ends[name]:
                digest.update(f"\n{name} {matrix.shape}\n".encode())
                digest.update(np.ascontiguousarray(matrix, np.float32).data)
        for place in sorted(self.experts):
            for matrix in self.experts[place]:
                digest.update(f"\nexpert {place} {matrix.shape}\n".encode())
                digest.update(np.ascontiguousarray(matrix, np.float32).data)
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
        if (
            not (expected or self.ends or self.experts)
            or not expected.keys() == self.a.keys() == self.b.keys() == self.scales.keys()
        ):
            raise AdapterError("a, b, scales and ranks must name the same projections, at least one")
        for key, rank in expected.items():
            if not 1 <= rank <= MAX_RANK:
                raise AdapterError(f"{module_name(*key)}: rank must be in 1..{MAX_RANK}, found {rank}")
            if geometry.expert_layers and geometry.expert_layers[key[0]] and ".mlp." in module_name(*key):
                raise AdapterError(
                    f"{module_name(*key)}: layer {key[0]} of the base model has experts in its place; adapt these"
                )
            d_in, d_out = geometry.dims(key[1])
            for name, matrix, shape in (("a", self.a[key], (rank, d_in)), ("b", self.b[key], (d_out, rank))):
                if matrix.shape != shape:
                    raise AdapterError(
                        f"{module_name(*key)}: {name} expected {[*shape]}, found {[*matrix.shape]}; "
                        "the adapter was probably made for another base model"
                    )
        for kind, vectors in self.vectors.items():
            for key, vector in vectors.items():
                if vector.shape != (geometry.dims(key[1])[1],) or (kind != "bias" and key not in self.a):
                    raise AdapterError(f"{module_name(*key)}: {kind}: expected [d_out], found {[*vector.shape]}")
        for name, (a, b) in self.ends.items():
            sizes = {"head": (geometry.hidden_size, geometry.vocab_size)}
            d_in, d_out = sizes.get(name, (geometry.vocab_size, geometry.hidden_size))
            if a.shape != (len(a), d_in) or b.shape != (d_out, len(a)) or not 1 <= len(a) <= MAX_RANK:
                raise AdapterError(
                    f"{name}: expected [r, {d_in}] and [{d_out}, r] with r in 1..{MAX_RANK}, found {[*a.shape]} and "
                    f"{[*b.shape]}"
                )
        found = np.zeros((geometry.num_layers, geometry.num_experts, len(EXPERT_PROJECTIONS)), np.int32)
        for (layer, projection, expert), (a, b) in self.experts.items():
            if not (geometry.expert_layers and geometry.expert_layers[layer] and expert < geometry.num_experts):
                raise AdapterError(f"layer {layer}: the base model has no expert {expert} there")
            d_in, d_out = geometry.expert_dims(projection)
            if a.shape != (len(a), d_in) or b.shape != (d_out, len(a)) or not 1 <= len(a) <= MAX_RANK:
                raise AdapterError(
                    f"layer {layer}, expert {expert}, {projection}: expected [r, {d_in}] and [{d_out}, r] with r in "
                    f"1..{MAX_RANK}, found {[*a.shape]} and {[*b.shape]}"
                )
            found[layer, expert, EXPERT_PROJECTIONS.index(projection)] = len(a)
        if self.experts and (self.expert_ranks is None or not np.array_equal(found, self.expert_ranks)):
            raise AdapterError("experts and expert_ranks must name the same ranks")


def extended(
    ranks: np.ndarray, vectors: bool, ends: Mapping[str, int] | None = None, experts: np.ndarray | None = None
) -> np.ndarray:
    """`ranks [..., 7]` as `[..., 10]`, with the ranks of the ends, by name, and with those of experts `[..., E, 3]` as
    `[..., 10 + 3 E]` (`pallas_kernels.lora.layout`)."""
    further = [int(vectors), *((ends or {}).get(name, 0) for name in ENDS)]
    parts = [ranks, np.broadcast_to(np.array(further, ranks.dtype), (*ranks.shape[:-1], 3))]
    if experts is not None:
        parts.append(experts.reshape(*ranks.shape[:-1], -1))
    return np.concatenate(parts, -1)
