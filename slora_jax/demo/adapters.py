"""Random PEFT adapters of mixed ranks and target modules."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from tqdm import tqdm

from slora_jax.adapters import BaseGeometry, random_adapter, write_peft

RANKS = (8, 16, 32, 64)
TARGETS = (("q", "v"), ("q", "k", "v", "o"), ("q", "k", "v", "o", "gate", "up", "down"))


@dataclass(frozen=True)
class DemoAdapter:
    """An adapter on disk; the engine knows it by its folder's name."""

    directory: Path
    rank: int
    targets: tuple[str, ...]

    @property
    def name(self) -> str:
        return self.directory.name


def write_adapters(root: Path, geometry: BaseGeometry, count: int, seed: int) -> list[DemoAdapter]:
    """Writes `count` float16 adapters to folders of `root`; every combination of rank and targets is equally common."""
    adapters = []
    for i in tqdm(range(count), desc="writing adapters", unit="adapter"):
        rank, targets = RANKS[i % len(RANKS)], TARGETS[i // len(RANKS) % len(TARGETS)]
        adapter = random_adapter(geometry, rank, targets, seed=seed + i)
        directory = write_peft(root / f"adapter-{i:04d}", adapter, dtype="float16")
        adapters.append(DemoAdapter(directory, rank, targets))
    return adapters
