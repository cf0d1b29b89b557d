"""What each system changes of the base settings."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from difflib import get_close_matches
from typing import Any

from slora_jax import ConfigError, EngineConfig

SOFTWARE = ("engine", "packed", "peft")


@dataclass(frozen=True)
class SystemSettings:
    """All that a system is, beside its model and adapters; plain values throughout.

    software: "engine" (this one), "packed" (`Packed`: as many engines as adapters, in the memory of the one) or "peft".
    engine: of the engine, or of the one whose memory is divided; its `dtype` holds for PEFT as well. policy,
    policy_settings: as `make_policy` takes them; None: the engine's default. split: under `split_memory`, the share of
    the pool set aside for adapters. peft_batch: most requests of a batch of PEFT's. peft_mixed: whether a batch of
    PEFT's mixes adapters.
    """

    software: str = "engine"
    engine: EngineConfig = field(default_factory=EngineConfig)
    policy: str | None = None
    policy_settings: Mapping[str, Any] = field(default_factory=dict)
    split_memory: bool = False
    split: float = 0.25
    peft_batch: int = 6
    peft_mixed: bool = False

    def __post_init__(self) -> None:
        if self.software not in SOFTWARE:
            raise ConfigError(f"SystemSettings.software={self.software!r}: must be one of {SOFTWARE}")
        if not 0 < self.split < 1:
            raise ConfigError(f"SystemSettings.split={self.split!r}: must be between 0 and 1")
        if not isinstance(self.peft_batch, int) or self.peft_batch < 1:
            raise ConfigError(f"SystemSettings.peft_batch={self.peft_batch!r}: must be an integer of at least 1")


SYSTEMS: dict[str, dict[str, Any]] = {
    "slora": {},
    "no-unify-mem": {"split_memory": True},
    "bmm": {"engine.lora": "bmm"},
    "merge": {"engine.lora": "merge"},
    "packed": {"software": "packed"},
    "base": {"engine.lora": "off"},
    "peft": {"software": "peft"},
    "peft-mixed": {"software": "peft", "peft_mixed": True},
}
"""Name -> what differs from the base settings, fields of the engine's by their dotted name."""


def settings_of(name: str, base: SystemSettings) -> SystemSettings:
    """The base settings with the changes of a system.

    Raises:
      ConfigError: there is no such system (the nearest one is named).
    """
    if name not in SYSTEMS:
        near = get_close_matches(name, SYSTEMS, n=1)
        hint = f" (did you mean {near[0]!r}?)" if near else ""
        raise ConfigError(f"system {name!r} is unknown{hint}; there are {', '.join(SYSTEMS)}")
    changes = SYSTEMS[name]
    engine = {key.removeprefix("engine."): value for key, value in changes.items() if key.startswith("engine.")}
    own = {key: value for key, value in changes.items() if not key.startswith("engine.")}
    return replace(base, engine=replace(base.engine, **engine), **own)
