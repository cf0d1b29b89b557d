"""Our trainer: all adapters in one step."""

from __future__ import annotations

from collections.abc import Sequence

import jax
import numpy as np

from experiments.training_bench.settings import BETAS, EPS, LEARNING_RATE, MICRO_TOKENS, RANKS, Cell, rank_of, sequences
from slora_jax.engine.sizing import adapter_geometry
from slora_jax.models import ModelConfig
from slora_jax.training import Adam, Example, Trainer, TrainerConfig


class System:
    """The adapters `paths`, in training."""

    def __init__(self, model_dir: str, paths: Sequence[str], cell: Cell, product: str) -> None:
        del product
        self._cell = cell
        layout = adapter_geometry(ModelConfig.from_directory(model_dir), 16).layout
        pages = 1 + sum(int(layout.num_pages(np.full(7, rank_of(i)))) for i in range(cell.adapters))
        config = TrainerConfig(
            num_pages=pages, max_adapters=cell.adapters, max_lora_rank=max(RANKS), lengths=(cell.length,),
            tokens=(min(MICRO_TOKENS, cell.tokens),), dtype="float32",
        )  # fmt: skip
        self._trainer = Trainer.from_pretrained(model_dir, config)
        adam = Adam(LEARNING_RATE, *BETAS, EPS)
        for i, path in enumerate(paths):
            self._trainer.add(str(i), path, adam)

    def step(self, number: int, adapters: int) -> list[float]:
        """Forward, backward and optimizer of the first `adapters` adapters. Returns each one's loss, a sum."""
        batches = {}
        for i in range(adapters):
            ids = sequences(self._cell, i, number, self._trainer.model.vocab_size)
            ones = np.ones(self._cell.length, np.float32)
            batches[str(i)] = [Example(row[:-1], row[1:], ones) for row in ids]
        outcomes = self._trainer.forward_backward(batches)
        self._trainer.optim_step(list(batches))
        jax.block_until_ready(self._trainer.pool.master)
        return [outcome.loss for outcome in outcomes.values()]
