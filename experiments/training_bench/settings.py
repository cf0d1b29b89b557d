"""Cells of the benchmark, and the tokens that every system trains on."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

RANKS = (8, 16, 32)
"""Ranks of the adapters, in turn."""
LEARNING_RATE, BETAS, EPS = 1e-3, (0.9, 0.95), 1e-12
MICRO_TOKENS = 2048
"""Largest number of tokens in one micro-step of slora-jax and of the stacks."""
SYSTEMS = ("slora-jax", "peft", "stack", "ragged_dot")
"""Our trainer; PEFT, one adapter after another; padded stacks by batched products; the same by `jax.lax.ragged_dot`."""


@dataclass(frozen=True)
class Cell:
    """One comparison.

    Attributes:
      sequences: sequences per adapter and step, of `length` tokens each.
      rounds: timed rounds at most.
      warm_up: steps before the timed ones, of the first `warm_up_adapters` adapters.
    """

    name: str
    adapters: int
    sequences: int
    length: int
    rounds: int
    warm_up: int
    warm_up_adapters: int
    systems: Sequence[str] = SYSTEMS[:3]

    @property
    def tokens(self) -> int:
        """Tokens of a step."""
        return self.adapters * self.sequences * self.length


CELLS = (
    Cell("small, 1 adapter", 1, 1, 64, 3, 3, 1, SYSTEMS),
    Cell("small, 8 adapters", 8, 1, 64, 3, 3, 8, SYSTEMS),
    Cell("small, 32 adapters", 32, 1, 64, 3, 1, 32),
    Cell("healthy, 1 adapter", 1, 4, 512, 2, 1, 1),
    Cell("healthy, 8 adapters", 8, 4, 512, 1, 1, 1),
)
QUICK = (Cell("small, 3 adapters", 3, 1, 16, 2, 2, 3, SYSTEMS),)


def rank_of(adapter: int) -> int:
    """The rank of an adapter."""
    return RANKS[adapter % len(RANKS)]


def sequences(cell: Cell, adapter: int, step: int, vocab_size: int) -> np.ndarray:
    """Random token ids of an adapter's step, int32 `[sequences, length + 1]`: inputs and, one further, targets."""
    rng = np.random.default_rng([adapter, step])
    return rng.integers(0, vocab_size, (cell.sequences, cell.length + 1)).astype(np.int32)
