"""Communication between shards: the paper's formulas (section 6), extended to the feed-forward and to other layouts.

Elements that each shard sends per layer in ring collectives, with N shards, B tokens, hidden size h and rank r:

                base                LoRA: q,k,v,o       gate,up,down        all LoRA
    slora       4 (N - 1) B h / N   5 (N - 1) B r / N   4 (N - 1) B r / N   9 (N - 1) B r / N
    replicated  same                0                   0                   0
    sharded_in  same                8 (N - 1) B r / N   6 (N - 1) B r / N   14 (N - 1) B r / N

The paper counts attention only: 2 (N - 1) B h / N for the base and 5 (N - 1) B r / N for LoRA. r is the engine's
`max_lora_rank`, because a program's shapes do not depend on the adapters in the batch; all-gathers of "slora" round it
up to a multiple of N. The engine sends data for all projections, with one collective per stack. The paper's code has
adapters on q, k, v, o only, with one collective each.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Literal

from slora_jax.models.projections import PROJECTIONS, STACKS
from slora_jax.parallel.layout import Shards


@dataclass(frozen=True)
class Message:
    """One collective: its HLO opcode, and the bytes of its result, which every shard receives in full."""

    kind: Literal["all-reduce", "all-gather"]
    bytes: int

    def sent(self, count: int) -> Fraction:
        """Returns the bytes that each of `count` shards sends in a ring; an all-reduce makes two passes."""
        rounds = 2 if self.kind == "all-reduce" else 1
        return Fraction(rounds * (count - 1) * self.bytes, count)


def base_messages(hidden_size: int, rows: int, itemsize: int) -> list[Message]:
    """Collectives of the base model in one layer, after o and after down, for `rows` tokens of `itemsize` bytes per
    element."""
    return [Message("all-reduce", rows * hidden_size * itemsize)] * 2


def lora_messages(
    shards: Shards, rows: int, max_rank: int, itemsize: int, stacks: Sequence[tuple[str, ...]] = tuple(STACKS.values())
) -> list[Message]:
    """Collectives of LoRA in one layer; the projections of a stack share one."""
    if shards.lora == "replicated":
        return []
    row = rows * itemsize
    padded_rank = -(-max_rank // shards.count) * shards.count
    return [
        Message("all-reduce", len(stack) * max_rank * row)
        if PROJECTIONS[stack[0]].row_parallel or shards.lora == "sharded_in"
        else Message("all-gather", len(stack) * padded_rank * row)
        for stack in stacks
    ]


def vocabulary_messages(hidden_size: int, shards: Shards, rows: int, seqs: int, itemsize: int) -> list[Message]:
    """Collectives of a step outside its layers: the embeddings, and each shard's best token and logit per sequence."""
    return [
        Message("all-reduce", rows * hidden_size * itemsize),
        Message("all-gather", shards.count * seqs * 8),  # token and logit, 4 bytes each
    ]
