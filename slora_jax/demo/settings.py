"""The demo's settings, without the demo: the command line reads its defaults here."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from slora_jax.errors import ConfigError


@dataclass(frozen=True)
class DemoSettings:
    """Settings of the demo. Where None, the default depends on the model (`demo.models`).

    Attributes:
      directory: Holds the demo's files; must be empty, missing, or left by an earlier demo.
      model: "smollm2", "tiny" (a small random model), or a path; None: SmolLM2 if it is installed, else tiny.
      layers: Layers of the tiny model.
      num_pages: Pages of the pool.
      checks: Answers compared with merged weights.
      seed: Seed of weights, prompts and arrivals.
    """

    directory: Path = Path(".demo")
    model: str | None = None
    adapters: int = 200
    requests: int | None = None
    layers: int = 4
    num_pages: int | None = None
    checks: int | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("adapters", "requests", "layers", "num_pages", "checks"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ConfigError(f"{name}={value}: must be at least 1")
