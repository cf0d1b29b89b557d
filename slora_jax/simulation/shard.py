"""The shape of one device's part of a sharded model."""

from __future__ import annotations

from dataclasses import dataclass, fields
from functools import cached_property
from typing import Any, cast

from pallas_kernels.lora.layout import LoraLayout
from slora_jax.parallel.layout import LoraSharding, Shards
from slora_jax.parallel.mesh import cut
from slora_jax.simulation.shape import ModelShape


@dataclass(frozen=True, kw_only=True)
class ShardShape(ModelShape):
    """One device's part of `whole` with `shards.count` devices; adapters' sizes follow their sharded layout, and the
    vocabulary is rounded up."""

    whole_shape: ModelShape
    cut_into: Shards

    @property
    def whole(self) -> ModelShape:
        return self.whole_shape

    @property
    def shards(self) -> Shards:
        return self.cut_into

    @cached_property
    def lora_params(self) -> int:
        """Elements of an adapter per rank. Where A is sharded by rank, rounding up is ignored."""
        elements = 0
        for stack in self.lora_layout(16).stacks:
            for projection, d_out in zip(stack.projections, stack.d_outs, strict=True):
                if projection in self.lora_targets:
                    elements += stack.d_in // stack.rank_shards + d_out
        return self.num_layers * elements

    def lora_layout(self, page_size: int) -> LoraLayout:
        return self.cut_into.of_layout(self.whole_shape.lora_layout(page_size))


def shard_shape(model: ModelShape, count: int, lora: LoraSharding = "slora") -> ModelShape:
    """Returns each device's part of `model` on `count` devices; `model` itself on one.

    Raises:
      ConfigError: a width of the model is not divisible; the message names it.
    """
    if count == 1:
        return model
    shards = cut(cast(Any, model), count, lora)  # same attribute names as `ModelConfig`
    own = {field.name: getattr(model, field.name) for field in fields(ModelShape)}
    own |= {
        "q_width": model.q_width // count,
        "kv_width": model.kv_width // shards.kv_parts,
        "intermediate_size": model.intermediate_size // count,
        "vocab_size": -(-model.vocab_size // count),
    }
    return ShardShape(**own, whole_shape=model, cut_into=shards)
