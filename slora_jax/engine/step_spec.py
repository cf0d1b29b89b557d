"""The shapes and settings that all step programs of an engine depend on."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Literal

import jax
import jax.numpy as jnp

from pallas_kernels import devices
from pallas_kernels.experts.api import Implementation as ExpertImplementation
from pallas_kernels.lora import LoraLayout, lora_tile_rows
from pallas_kernels.lora.api import Implementation as LoraImplementation
from pallas_kernels.lora.bmm import Padding, paddings
from pallas_kernels.paged_attention.api import Implementation
from slora_jax.engine.batch import BatchLayout, Bucket, SequenceState
from slora_jax.memory import PoolShape
from slora_jax.models import ModelConfig, Params
from slora_jax.models.projections import lora_layout
from slora_jax.parallel.layout import ONE_DEVICE, Shards
from slora_jax.parallel.mesh import TensorParallel

Lora = bool | Padding | Literal["extras", "experts"]
"""LoRA work that a step program is compiled for: False for none, True for any (gathered), "extras" for adapters with
more than LoRA on projections too, "experts" for those and LoRA on experts, or a padded shape (`bmm`)."""


def with_extras(lora: Lora) -> bool:
    """Returns whether a program is for adapters with more than LoRA on projections."""
    return isinstance(lora, str)


@dataclass(frozen=True)
class StepSpec:
    """Shapes and structure that all step programs of an engine depend on.

    Attributes:
      model: the whole model.
      graphdef: graph definition of the decoder; with `parallel`, of a shard's decoder.
      params: `jax.ShapeDtypeStruct` leaves of the whole model, with shardings if there are several shards.
      pool: shape of the whole pool.
      max_rank: `max_lora_rank`.
      kernels: see `EngineConfig`; None is the plan tables' choice for the device.
      parallel: sharding, None on one device.
      lora, adapter_extras: see `EngineConfig`.
    """

    model: ModelConfig
    graphdef: Any
    params: Params
    pool: PoolShape
    max_num_seqs: int
    max_pages_per_seq: int
    max_rank: int
    kernels: Implementation | None = None
    parallel: TensorParallel | None = None
    lora: str = "paged"
    adapter_extras: bool = False

    @property
    def shards(self) -> Shards:
        return ONE_DEVICE if self.parallel is None else self.parallel.shards

    @property
    def shard_model(self) -> ModelConfig:
        """The model whose program each shard runs."""
        return self.shards.of_model(self.model)

    @property
    def shard_pool(self) -> PoolShape:
        """Shape of each shard's part of the pool."""
        return replace(self.pool, width=self.pool.width // self.shards.count)

    @property
    def interpret(self) -> bool:
        """True if GPU kernels are selected by name but there is no GPU, so that they run in their interpreters."""
        return self.kernels not in (None, "xla") and devices.target() is None

    @property
    def layered(self) -> bool:
        """True on a CPU, where a step is compiled layer by layer (`engine.layered`)."""
        return devices.target() is None

    def attention_kernels(self, decode: bool) -> Implementation | None:
        """Implementation of attention; None is the plan tables' choice."""
        return "triton" if decode and self.kernels == "mosaic_gpu" else self.kernels

    @property
    def lora_kernels(self) -> LoraImplementation | None:
        """Implementation of LoRA products; None is the plan tables' choice."""
        if self.lora == "bmm":
            return "bmm"
        return "triton" if self.kernels == "mosaic_gpu" else self.kernels

    @property
    def expert_kernels(self) -> ExpertImplementation | None:
        """Implementation of products with experts; None is the plan table's choice."""
        return "triton" if self.kernels == "mosaic_gpu" else self.kernels

    def lora_programs(self, layout: BatchLayout) -> tuple[Lora, ...]:
        """Returns the LoRA work that a bucket's programs are compiled for, least first."""
        if self.lora == "paged":
            extras: tuple[Lora, ...] = ("extras", "experts") if self.expert_adapters else ("extras",)
            return (False, True, *extras) if self.adapter_extras else (False, True)
        if self.lora != "bmm":
            return (False,)
        bucket, adapters = layout.bucket, min(layout.bucket.seqs, self.pool.adapter_slots)
        return False, *paddings(bucket.tokens, adapters, decode=bucket.decode, tile_rows=layout.lora_tile_rows)

    def has_ends(self, with_lora: Lora) -> bool:
        """Returns whether a program with this LoRA work applies changes of embedding and head."""
        return with_extras(with_lora) and self.shards.count == 1

    @property
    def expert_adapters(self) -> bool:
        """True if LoRA on experts is served."""
        return self.pool.experts > 0

    @property
    def lora_layout(self) -> LoraLayout:
        layout = lora_layout(self.model, self.pool.tile_rows)
        if self.adapter_extras:
            layout = replace(layout, num_layers=self.model.num_layers, vocab_size=self.model.vocab_size)
            if self.expert_adapters:
                assert self.model.experts is not None
                count, width = self.model.experts.count, self.model.experts.intermediate_size
                layout = replace(layout, experts=count, expert_width=width)
        return self.shards.of_layout(layout)

    def layout(self, bucket: Bucket) -> BatchLayout:
        """Returns the layout of a bucket's metadata."""
        rows = lora_tile_rows(
            self.lora_layout,
            self.pool.dtype,
            decode=bucket.decode,
            split=self.shards.count > 1,
            implementation=self.lora_kernels,
        )
        return BatchLayout(
            bucket, self.pool.page_size, self.max_num_seqs, self.pool.adapter_slots, min(bucket.tokens, rows)
        )

    def state_struct(self) -> SequenceState:
        """Shapes of the device's sequence state."""
        return SequenceState(
            page_table=jax.ShapeDtypeStruct((self.max_num_seqs + 1, self.max_pages_per_seq), jnp.int32),  # type: ignore[arg-type]
            last_token=jax.ShapeDtypeStruct((self.max_num_seqs + 1,), jnp.int32),  # type: ignore[arg-type]
        )

    def make_state(self) -> SequenceState:
        device = None if self.parallel is None else self.parallel.replicated
        return jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype, device=device), self.state_struct())
