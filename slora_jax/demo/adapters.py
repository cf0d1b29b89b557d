"""Random PEFT adapters of mixed ranks and target modules."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from tqdm import tqdm

from slora_jax.adapters import BaseGeometry, random_adapter, write_peft
from slora_jax.demo.models import TINY_LOAD

RANKS, TARGETS = TINY_LOAD.ranks, TINY_LOAD.targets


@dataclass(frozen=True)
class DemoAdapter:
    """An adapter on disk; the engine knows it by its folder's name."""

    directory: Path
    rank: int
    targets: tuple[str, ...]

    @property
    def name(self) -> str:
        return self.directory.name


def write_adapters(
    root: Path,
    geometry: BaseGeometry,
    count: int,
    seed: int,
    ranks: Sequence[int] = RANKS,
    targets: Sequence[tuple[str, ...]] = TARGETS,
) -> list[DemoAdapter]:
    """Writes `count` float16 adapters to folders of `root`, cycling through all pairs of `ranks` and `targets`."""
    adapters = []
    for i in tqdm(range(count), desc="writing adapters", unit="adapter"):
        rank, modules = ranks[i % len(ranks)], targets[i // len(ranks) % len(targets)]
        adapter = random_adapter(geometry, rank, modules, seed=seed + i)
        directory = write_peft(root / f"adapter-{i:04d}", adapter, dtype="float16")
        adapters.append(DemoAdapter(directory, rank, modules))
    return adapters
