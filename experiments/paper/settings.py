"""The paper's settings S1 to S6: a base model, and the ranks that its adapters take in turn (section 7, its code)."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

MODELS = Path(__file__).parents[1] / "models"


@dataclass(frozen=True)
class Setting:
    """model: file of `experiments/models`. ranks: adapter i has rank `ranks[i % len(ranks)]`, on q, k, v, o."""

    name: str
    model: str
    ranks: tuple[int, ...]

    @property
    def model_file(self) -> Path:
        return MODELS / self.model


SETTINGS = {
    s.name: s
    for s in (
        Setting("S1", "llama-7b.json", (8,)),
        Setting("S2", "llama-7b.json", (64, 32, 16, 8)),
        Setting("S3", "llama-13b.json", (16,)),
        Setting("S4", "llama-13b.json", (64, 32, 16)),
        Setting("S5", "llama-30b.json", (32,)),
        Setting("S6", "llama-70b.json", (64,)),
    )
}

DEVICES = ("a10g", "a100-40", "a100-80")
"""Devices of the published runs, as the simulator's device files name them."""
