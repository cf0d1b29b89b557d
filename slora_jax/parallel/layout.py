"""Sharding of parameters, pool and adapters over N devices (paper section 6, figure 4).

**Base model**, as in Megatron: q,k,v and gate,up are split by output columns, o and down by input rows, embedding and
head by vocabulary; each expert like gate,up and down; norms and routers are replicated. A shard runs the program of a
smaller model (`Shards.of_model`) with two all-reduces per layer.

**Pool**: split along W. A page id is the same page on all shards; each holds the KV of its own heads, `W_s = W / N`
columns. With fewer KV heads than shards, neighbouring shards hold the same head, and W_s is the width of one head.

**Adapters** are in the same pages: a shard holds its part of an adapter as tiles `[page_size, W_s]`, in the order that
`pallas_kernels.lora.layout` defines for the shard's stacks. For column-split stacks, A1 `[r, d]` is split by rank and
B1 `[r, d_out]` by output; for row-split stacks, A2 `[r, d_in]` is split by input and B2 `[r, d]` by output:

    stack      A rows per shard    A columns     B rows     B columns
    q,k,v      ceil(r / N) each    d             r          d_out / N
    o          r                   d_in / N      r          d / N
    gate,up    ceil(r / N) each    d             r          d_out / N
    down       r                   d_in / N      r          d / N

A shard's tiles are N times narrower and hold one Nth of A1's rows, so its part of an adapter takes as many pages as the
whole adapter on one device, up to the last row block of each stack. A1's rows are distributed round-robin: rank j of a
projection is row `j // N` of shard `j % N`. Every shard has `ceil(r / N)` rows, padded with zeros where N does not
divide r. All shards therefore have the same tiles, page ids, tables and work lists, and waste at most one row per
projection (one row block per stack). An all-gather of `x A1` over the shards, transposed, is in the order of B's rows
for any rank.

The vectors of an adapter (DoRA's scales, biases) are split like the base product: for column-split stacks by output.
For row-split ones, whose product is a partial sum, every shard holds all scales, and shard 0 all biases.

Two other layouts, for comparison:

- "replicated", vLLM's default: every shard holds all of A1 and B2 and computes all of `x A1` and `h B2`. LoRA needs no
  communication.
- "sharded_in": A1 is split by input like A2. Each shard's `x A1` is a partial sum `[T, r]`, followed by an all-reduce.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal, get_args

from pallas_kernels.lora.layout import LoraLayout, Stack
from slora_jax.errors import ConfigError
from slora_jax.models.projections import PROJECTIONS, ROW_PARALLEL

if TYPE_CHECKING:
    from slora_jax.models.config import ModelConfig

LoraSharding = Literal["slora", "replicated", "sharded_in"]
LORA_SHARDINGS = get_args(LoraSharding)


@dataclass(frozen=True)
class Shards:
    """Numbers of shards, and the adapters' layout.

    Attributes:
      count: N.
      kv_parts: parts of the KV heads, min(N, number of KV heads).
      lora: layout of the adapters.
    """

    count: int = 1
    kv_parts: int = 1
    lora: LoraSharding = "slora"

    def of_model(self, model: ModelConfig) -> ModelConfig:
        """Returns the model whose program a shard runs. Its vocabulary size is rounded up.

        Raises:
          ConfigError: the model's experts or norms cannot be sharded.
        """
        if self.count == 1:
            return model
        where = f"EngineConfig.tensor_parallel_size={self.count}: the model's"
        if model.qk_norm == "width":
            raise ConfigError(f"{where} qk_norm='width' needs all queries and keys of a token on one device; use 1")
        experts = model.experts
        if experts is not None:
            if experts.intermediate_size % self.count:
                width = experts.intermediate_size
                raise ConfigError(f"{where} experts.intermediate_size={width} must be a multiple of it")
            experts = replace(experts, intermediate_size=experts.intermediate_size // self.count)
        return replace(
            model,
            experts=experts,
            num_heads=model.num_heads // self.count,
            num_kv_heads=model.num_kv_heads // self.kv_parts,
            intermediate_size=model.intermediate_size // self.count,
            vocab_size=-(-model.vocab_size // self.count),
        )

    def of_layout(self, whole: LoraLayout) -> LoraLayout:
        """Returns a shard's adapter layout, given the layout on one device."""
        if self.count == 1:
            return whole
        return LoraLayout(
            stacks=tuple(map(self._of_stack, whole.stacks)),
            page_size=whole.page_size,
            width=whole.width // self.kv_parts,
        )

    def _of_stack(self, stack: Stack) -> Stack:
        is_row_parallel = stack.name in ROW_PARALLEL
        return Stack(
            stack.name,
            stack.projections,
            _size(self.inputs(stack.projections[0], stack.d_in, 0)),
            tuple(_size(self.outputs(p, d, 0)) for p, d in zip(stack.projections, stack.d_outs, strict=True)),
            rank_shards=self.count if self.lora == "slora" and not is_row_parallel else 1,
            out_shards=self.count if self.lora != "replicated" and is_row_parallel else 1,
        )

    def inputs(self, projection: str, d_in: int, shard: int) -> slice:
        """Columns of a projection's A `[r, d_in]` that a shard holds."""
        is_split = PROJECTIONS[projection].row_parallel or self.lora == "sharded_in"
        return self.part(d_in, shard) if is_split else slice(0, d_in)

    def outputs(self, projection: str, d_out: int, shard: int) -> slice:
        """Columns of a projection's B `[r, d_out]` that a shard holds."""
        if PROJECTIONS[projection].row_parallel and self.lora == "replicated":
            return slice(0, d_out)
        by_heads = PROJECTIONS[projection].d_out == "kv_width"
        return self.kv_part(d_out, shard) if by_heads else self.part(d_out, shard)

    def base_outputs(self, projection: str, d_out: int) -> list[slice]:
        """Columns of a projection's base product that each shard holds; o and down: all, in one part, since each shard
        has a partial sum."""
        if PROJECTIONS[projection].row_parallel:
            return [slice(0, d_out)]
        return [self.outputs(projection, d_out, shard) for shard in range(self.count)]

    def ranks(self, stack: Stack, shard: int) -> slice:
        """Rows of a projection's A that a shard holds. `stack` is from the shard's layout (`of_layout`)."""
        return slice(shard, None, self.count) if stack.rank_shards > 1 else slice(None)

    def part(self, width: int, shard: int) -> slice:
        """A shard's equal part of `width`."""
        size = width // self.count
        return slice(shard * size, (shard + 1) * size)

    def kv_part(self, width: int, shard: int) -> slice:
        """A shard's part of a width that is split by KV heads."""
        size, part = width // self.kv_parts, shard * self.kv_parts // self.count
        return slice(part * size, (part + 1) * size)

    def vocabulary(self, vocab_size: int, shard: int) -> slice:
        """Token ids whose embeddings and logits a shard holds; the last shards may have fewer or none."""
        size = -(-vocab_size // self.count)
        return slice(min(vocab_size, shard * size), min(vocab_size, (shard + 1) * size))


ONE_DEVICE = Shards()
"""No sharding."""


def _size(part: slice) -> int:
    return part.stop - part.start
