"""The requests that both sides answer."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from experiments.vllm_comparison.settings import Settings


@dataclass(frozen=True)
class Requests:
    """Prompts of token ids, the adapter of each (None: base model), and the number of new tokens of every one."""

    prompts: list[list[int]]
    adapters: list[str | None]
    output: int

    @property
    def new_tokens(self) -> int:
        return len(self.prompts) * self.output

    def short(self) -> Requests:
        """The same requests with prompts of at most 8 tokens and 4 new tokens: they touch every adapter."""
        return Requests([prompt[:8] for prompt in self.prompts], self.adapters, min(self.output, 4))

    def message(self) -> dict[str, Any]:
        """The message that has a worker answer them."""
        return asdict(self)


def make_requests(settings: Settings, vocab: int, count: int, prefix: str, num_adapters: int) -> Requests:
    """`count` requests spread evenly, in random order, over the adapters `prefix`0 .. `prefix`(n-1); 0 adapters: base
    model only. Prompts depend on `count` and the seed alone."""
    rng = np.random.default_rng(settings.seed)
    lengths = rng.integers(settings.prompt_low, settings.prompt_high + 1, count)
    prompts = [rng.integers(3, vocab, length).tolist() for length in lengths]
    adapters: list[str | None] = [None] * count
    if num_adapters:
        adapters = [f"{prefix}{i}" for i in rng.permutation(np.arange(count) * num_adapters // count)]
    return Requests(prompts, adapters, settings.output)
