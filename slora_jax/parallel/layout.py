"""How parameters, pool and adapters are cut into N shards (paper section 6, figure 4).

**The base** is cut as Megatron does: q,k,v and gate,up by output columns, o and down by input rows, embedding and head
by vocabulary; norms are everywhere. So a shard's program is that of a smaller model (`Shards.of_model`) with sums over
the shards in two places of a layer.

**The pool** is cut along W: a page id names the same page on all shards, of which each holds the keys and values of its
own heads, `W_s = W / N` columns. With fewer KV heads than shards, neighbouring shards hold the same head: W_s is its
width.

**Adapters** lie in the same pages: of a page, each shard holds tiles `[page_size, W_s]` of its own part of the adapter,
in the order that `pallas_kernels.lora.layout` gives to the shard's stacks. Where the base is cut by columns,
A1 `[r, d]` is cut by rank and B1 `[r, d_out]` by output; where it is cut by rows, A2 `[r, d_in]` is cut by input and
B2 `[r, d]` by output:

    stack      A rows a shard      A columns     B rows     B columns
    q,k,v      ceil(r / N) each    d             r          d_out / N
    o          r                   d_in / N      r          d / N
    gate,up    ceil(r / N) each    d             r          d_out / N
    down       r                   d_in / N      r          d / N

A shard's tile is N times narrower, so a row of A1 takes N times as many tiles, of which a shard has one Nth of the
rows: a shard's part of an adapter takes as many pages as the whole adapter on one device, give or take the last row
block of each stack. A1's rows are dealt one by one: rank j of a projection goes to shard `j % N`, as its row
`j // N`. All shards lay out `ceil(r / N)` rows, the largest share; where N does not divide r, some end in zeros. So
all shards have the same tiles, page ids, tables and work lists, and at most one row of each projection, hence at most
one row block of each stack, is waste. What an all-gather of the shards' `x A1` brings has rank j at shard `j % N`,
row `j // N`: transposed, it is in the order of B's rows, whatever the adapter's rank is.

Two other layouts, for comparison:

- "replicated", vLLM's default: A1 and B2 are whole on every shard. LoRA sends nothing; every shard does all of `x A1`
  and of `h B2`, and holds all of both.
- "sharded_in": A1 is cut by input, as A2: each shard's `x A1` is a partial sum `[T, r]`, and is summed over the shards.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal, get_args

from pallas_kernels.lora.layout import LoraLayout, Stack
from slora_jax.models.projections import PROJECTIONS, ROW_PARALLEL

if TYPE_CHECKING:
    from slora_jax.models.config import ModelConfig

LoraSharding = Literal["slora", "replicated", "sharded_in"]
LORA_SHARDINGS = get_args(LoraSharding)


@dataclass(frozen=True)
class Shards:
    """count: N. kv_parts: parts that the KV heads are cut into: N, or the number of KV heads where that is less. lora:
    how adapters are cut."""

    count: int = 1
    kv_parts: int = 1
    lora: LoraSharding = "slora"

    def of_model(self, model: ModelConfig) -> ModelConfig:
        """The model whose program a shard runs. Its vocabulary is rounded up."""
        if self.count == 1:
            return model
        return replace(
            model,
            num_heads=model.num_heads // self.count,
            num_kv_heads=model.num_kv_heads // self.kv_parts,
            intermediate_size=model.intermediate_size // self.count,
            vocab_size=-(-model.vocab_size // self.count),
        )

    def of_layout(self, whole: LoraLayout) -> LoraLayout:
        """The adapter layout of a shard, from that of the whole model on one device."""
        if self.count == 1:
            return whole
        return LoraLayout(
            stacks=tuple(map(self._of_stack, whole.stacks)),
            page_size=whole.page_size,
            width=whole.width // self.kv_parts,
        )

    def _of_stack(self, stack: Stack) -> Stack:
        is_dealt = stack.name not in ROW_PARALLEL and self.lora == "slora"
        return Stack(
            stack.name,
            stack.projections,
            _size(self.inputs(stack.projections[0], stack.d_in, 0)),
            tuple(_size(self.outputs(p, d, 0)) for p, d in zip(stack.projections, stack.d_outs, strict=True)),
            rank_shards=self.count if is_dealt else 1,
        )

    def inputs(self, projection: str, d_in: int, shard: int) -> slice:
        """Columns of a projection's A `[r, d_in]` that a shard holds."""
        cut = PROJECTIONS[projection].row_parallel or self.lora == "sharded_in"
        return self.part(d_in, shard) if cut else slice(0, d_in)

    def outputs(self, projection: str, d_out: int, shard: int) -> slice:
        """Columns of a projection's B `[r, d_out]` that a shard holds."""
        if PROJECTIONS[projection].row_parallel and self.lora == "replicated":
            return slice(0, d_out)
        by_heads = PROJECTIONS[projection].d_out == "kv_width"
        return self.kv_part(d_out, shard) if by_heads else self.part(d_out, shard)

    def ranks(self, stack: Stack, shard: int) -> slice:
        """Rows of a projection's A that a shard holds, of a stack of its own layout (`of_layout`)."""
        return slice(shard, None, self.count) if stack.rank_shards > 1 else slice(None)

    def part(self, width: int, shard: int) -> slice:
        """A shard's equal part of `width`."""
        size = width // self.count
        return slice(shard * size, (shard + 1) * size)

    def kv_part(self, width: int, shard: int) -> slice:
        """A shard's part of a width that goes by KV heads."""
        size, part = width // self.kv_parts, shard * self.kv_parts // self.count
        return slice(part * size, (part + 1) * size)

    def vocabulary(self, vocab_size: int, shard: int) -> slice:
        """Tokens whose embedding and logits a shard has; the last shards may have fewer, or none."""
        size = -(-vocab_size // self.count)
        return slice(min(vocab_size, shard * size), min(vocab_size, (shard + 1) * size))


ONE_DEVICE = Shards()
"""Nothing is cut."""


def _size(part: slice) -> int:
    return part.stop - part.start
