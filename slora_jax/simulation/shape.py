"""Sizes of a base model for the cost model."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from pallas_kernels.lora.layout import LoraLayout, tile_rows
from slora_jax.errors import ConfigError
from slora_jax.models import ModelConfig
from slora_jax.models.projections import PROJECTIONS, lora_layout
from slora_jax.models.quantised import num_groups
from slora_jax.models.traits import WeightFormat
from slora_jax.parallel.layout import ONE_DEVICE, Shards
from slora_jax.typed import Count, check_fields

ATTENTION = ("q", "k", "v", "o")
"""Target projections of the paper's adapters."""


@dataclass(frozen=True)
class ModelShape:
    """Sizes of a Llama-like decoder, in elements.

    Attributes:
      dtype_bytes: bytes of an element of unquantised weights, and of KV and adapters with kv_dtype "auto".
      lora_targets: projections targeted by every adapter, each at the adapter's rank.
      head_dim: width of a head, the unit in which q and kv are sharded.
      kv_dtype: of the system that serves the model (`CoreConfig.kv_dtype`).
      weights: format of the layers' kernels; None: unquantised.
    """

    num_layers: Count
    hidden_size: Count
    q_width: Count
    kv_width: Count
    intermediate_size: Count
    vocab_size: Count
    tie_word_embeddings: bool = False
    dtype_bytes: Count = 2
    lora_targets: tuple[str, ...] = ATTENTION
    head_dim: Count = 128
    kv_dtype: str = "auto"
    weights: WeightFormat | None = None

    def __post_init__(self) -> None:
        check_fields(self)
        unknown = [name for name in self.lora_targets if name not in PROJECTIONS]
        if unknown or not self.lora_targets:
            raise ConfigError(
                f"ModelShape.lora_targets={self.lora_targets!r}: must be some of {', '.join(PROJECTIONS)}"
            )

    @classmethod
    def of(cls, model: ModelConfig, dtype_bytes: int = 2, lora_targets: Sequence[str] = ATTENTION) -> ModelShape:
        """Returns the shape of a checkpoint's config. Raises ConfigError for a model with experts."""
        if model.experts is not None:
            raise ConfigError(f"the cost model has no experts, but the model has {model.experts.count} in a layer")
        return cls(
            num_layers=model.num_layers,
            hidden_size=model.hidden_size,
            q_width=model.q_width,
            kv_width=model.kv_width,
            intermediate_size=model.intermediate_size,
            vocab_size=model.vocab_size,
            tie_word_embeddings=model.tie_word_embeddings,
            dtype_bytes=dtype_bytes,
            lora_targets=tuple(lora_targets),
            head_dim=model.head_dim,
            weights=model.weights,
        )

    @property
    def whole(self) -> ModelShape:
        """The whole model; differs from `self` for a shard (`shard_shape`)."""
        return self

    @property
    def shards(self) -> Shards:
        """The sharding of `whole`."""
        return ONE_DEVICE

    @property
    def num_heads(self) -> int:
        return self.q_width // self.head_dim

    @property
    def num_kv_heads(self) -> int:
        return self.kv_width // self.head_dim

    @cached_property
    def layer_params(self) -> int:
        """Matrix elements of one layer."""
        return sum(math.prod(projection.dims(self)) for projection in PROJECTIONS.values())

    @cached_property
    def head_params(self) -> int:
        """Elements of the output head (and of the embedding)."""
        return self.vocab_size * self.hidden_size

    @cached_property
    def params(self) -> int:
        """Matrix elements of the model, without norms."""
        return self.num_layers * self.layer_params + self.head_params * (1 if self.tie_word_embeddings else 2)

    @cached_property
    def layer_bytes(self) -> int:
        """Memory of one layer's matrices, with the scales of quantised ones.

        Raises:
          UnsupportedModelError: as `models.quantised.group_size`.
        """
        if self.weights is None:
            return self.layer_params * self.dtype_bytes
        dims = [projection.dims(self) for projection in PROJECTIONS.values()]
        scales = sum(num_groups(self.weights, d_in) * d_out for d_in, d_out in dims)
        return self.layer_params // (2 if self.weights == "int4" else 1) + 4 * scales

    @property
    def head_bytes(self) -> int:
        """Memory of the output head."""
        return self.head_params * self.dtype_bytes

    @property
    def weight_bytes(self) -> int:
        """Memory of the base weights, without norms."""
        return self.num_layers * self.layer_bytes + self.head_bytes * (1 if self.tie_word_embeddings else 2)

    @property
    def kv_bytes(self) -> int:
        """Bytes of keys and values per token over all layers, equal to the pool's bytes per token."""
        if self.kv_dtype == "auto":
            return 2 * self.num_layers * self.kv_width * self.dtype_bytes
        scales = 2 * self.num_kv_heads if self.kv_dtype == "int8" else 0
        return 2 * self.num_layers * (self.kv_width + scales)

    @cached_property
    def lora_params(self) -> int:
        """Elements of an adapter's A and B per rank, over its projections and all layers."""
        return self.num_layers * sum(sum(PROJECTIONS[name].dims(self)) for name in self.lora_targets)

    @property
    def lora_bytes(self) -> int:
        """Bytes of an adapter per rank."""
        return self.lora_params * (self.dtype_bytes if self.kv_dtype == "auto" else 2)

    @cached_property
    def merged_params(self) -> int:
        """Elements of the base matrices that an adapter changes when merged."""
        return self.num_layers * sum(math.prod(PROJECTIONS[name].dims(self)) for name in self.lora_targets)

    def ranks(self, rank: int) -> np.ndarray:
        """int32 `[7]`: an adapter's rank in every projection."""
        return np.array([rank if name in self.lora_targets else 0 for name in PROJECTIONS], np.int32)

    def adapter_pages(self, rank: int, page_size: int) -> int:
        """Pages of the pool that an adapter occupies in its `LoraLayout`. With page_size 1, the paper's projections and
        no grouped-query attention this is 4 * rank, S-LoRA's rule."""
        return int(self.lora_layout(tile_rows(page_size, self.kv_dtype)).num_pages(self.ranks(rank)))

    def lora_layout(self, page_size: int) -> LoraLayout:
        """The layout of adapters in tiles of `page_size` rows."""
        return lora_layout(self, page_size)
