"""PEFT and torch's AdamW: one adapter after another over one base model."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

import peft
import torch
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM

from experiments.training_bench.settings import BETAS, EPS, LEARNING_RATE, Cell, sequences


class System:
    """The adapters `paths`, in one PEFT model; only the active one's parameters require a gradient."""

    def __init__(self, model_dir: str, paths: Sequence[str], cell: Cell, product: str) -> None:
        del product
        self._cell = cell
        torch.set_num_threads(len(os.sched_getaffinity(0)))
        base: Any = AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32, use_cache=False)
        self._model = peft.PeftModel.from_pretrained(base, paths[0], adapter_name="a0", is_trainable=True)
        for i, path in enumerate(paths[1:], 1):
            self._model.load_adapter(path, adapter_name=f"a{i}", is_trainable=True)
        self._model.train()
        self._optimizers = []
        for i in range(len(paths)):
            own = [parameter for name, parameter in self._model.named_parameters() if f".a{i}." in name]
            optimizer = torch.optim.AdamW(own, LEARNING_RATE, BETAS, EPS, weight_decay=0.0, fused=True)
            self._optimizers.append(optimizer)

    def step(self, number: int, adapters: int) -> list[float]:
        """Forward, backward and optimizer of the first `adapters` adapters. Returns each one's loss, a sum."""
        losses = []
        for i, optimizer in enumerate(self._optimizers[:adapters]):
            if self._model.active_adapter != f"a{i}":
                self._model.set_adapter(f"a{i}")
            ids = torch.from_numpy(sequences(self._cell, i, number, self._model.config.vocab_size)).long()
            logits = self._model(input_ids=ids[:, :-1]).logits
            loss = cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten(), reduction="sum")
            loss.backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            losses.append(loss.item())
        return losses
