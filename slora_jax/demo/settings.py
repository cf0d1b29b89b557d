"""The demo's settings, apart from the demo since the command line imports their defaults."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from slora_jax.errors import ConfigError


@dataclass(frozen=True)
class DemoSettings:
    """Settings of the demo. None selects the model's default (`demo.models`).

    Attributes:
      directory: for the demo's files; must be empty, missing, or left by an earlier demo.
      model: "smollm2", "tiny" (a small random model), or a path; None: SmolLM2 if installed, else tiny.
      layers: layers of the tiny model.
      num_pages: pages of the pool.
      checks: number of answers compared with merged weights.
      seed: random seed of weights, prompts and arrivals.
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
