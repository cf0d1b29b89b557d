"""The demo's settings, without the demo: the command line reads its defaults here."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from slora_jax.errors import ConfigError


@dataclass(frozen=True)
class DemoSettings:
    """directory: where model, adapters and compiled programs go; created, or left by an earlier demo.
    num_pages: pages of the pool. checks: answers compared with merged weights."""

    directory: Path = Path(".demo")
    adapters: int = 200
    requests: int = 300
    layers: int = 4
    num_pages: int = 512
    checks: int = 13
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("adapters", "requests", "layers", "num_pages", "checks"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name}={getattr(self, name)}: must be at least 1")
