"""Traffic between shards: the paper's formulas (section 6), extended to the feed-forward and to the other layouts.

With N shards, B rows, hidden size h and rank r, in elements a layer, sent by each shard in ring collectives:

                base                LoRA: q,k,v,o       gate,up,down        together
    slora       4 (N - 1) B h / N   5 (N - 1) B r / N   4 (N - 1) B r / N   9 (N - 1) B r / N
    replicated  same                0                   0                   0
    sharded_in  same                8 (N - 1) B r / N   6 (N - 1) B r / N   14 (N - 1) B r / N

The paper counts attention only: 2 (N - 1) B h / N beside 5 (N - 1) B r / N. r is the engine's `max_rank`: a program's
shapes do not depend on what adapters are in the batch. Where "slora" gathers, r is rounded up to a multiple of N.
The engine's programs always send for all projections, with one collective a stack; the paper's code has
adapters on q, k, v, o only, and one collective for each.
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
    """One collective. kind: its HLO opcode. bytes: of the result, which every shard has whole in the end."""

    kind: Literal["all-reduce", "all-gather"]
    bytes: int

    def sent(self, count: int) -> Fraction:
        """Bytes that each of `count` shards sends in a ring: a gather passes on every part but one; a sum does so
        twice."""
        rounds = 2 if self.kind == "all-reduce" else 1
        return Fraction(rounds * (count - 1) * self.bytes, count)


def base_messages(hidden_size: int, rows: int, itemsize: int) -> list[Message]:
    """Of the base in one layer: after o and after down. itemsize: bytes of an element."""
    return [Message("all-reduce", rows * hidden_size * itemsize)] * 2


def lora_messages(
    shards: Shards, rows: int, max_rank: int, itemsize: int, stacks: Sequence[tuple[str, ...]] = tuple(STACKS.values())
) -> list[Message]:
    """Collectives of the adapters in one layer, one for each of `stacks`: projections whose adapters share a
    collective."""
    if shards.lora == "replicated":
        return []
    row = rows * itemsize
    dealt = -(-max_rank // shards.count) * shards.count
    return [
        Message("all-reduce", len(stack) * max_rank * row)
        if PROJECTIONS[stack[0]].row_parallel or shards.lora == "sharded_in"
        else Message("all-gather", len(stack) * dealt * row)
        for stack in stacks
    ]


def vocabulary_messages(hidden_size: int, shards: Shards, rows: int, seqs: int, itemsize: int) -> list[Message]:
    """Of a step, beside its layers: the embeddings of its rows, and each sequence's best token (4 bytes) with its logit
    (4 bytes) of every shard."""
    return [
        Message("all-reduce", rows * hidden_size * itemsize),
        Message("all-gather", shards.count * seqs * 8),
    ]
