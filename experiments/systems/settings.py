"""The changes of each system to the base settings."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from slora_jax import ConfigError, EngineConfig
from slora_jax.typed import nearest

SOFTWARE = ("engine", "packed", "peft")


@dataclass(frozen=True)
class SystemSettings:
    """A system without its model and adapters, as plain values.

    Attributes:
      software: "engine" (this one), "packed" (`Packed`: an engine per adapter, in the memory of one) or "peft".
      engine: settings of the engine, or of the one whose memory is divided; PEFT uses its `dtype`.
      policy, policy_settings: as in `make_policy`; None: the engine's default.
      split_memory, split: whether a share of the pool is set aside for adapters, and that share.
      peft_batch: requests in a batch of PEFT, at most.
      peft_mixed: whether a batch of PEFT mixes adapters.
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
"""Name -> changed fields; those of the engine's settings by their dotted name."""


def settings_of(name: str, base: SystemSettings) -> SystemSettings:
    """Returns the base settings with the changes of a system.

    Raises:
      ConfigError: the system is unknown.
    """
    if name not in SYSTEMS:
        raise ConfigError(f"system {name!r} is unknown{nearest(name, SYSTEMS)}; there are {', '.join(SYSTEMS)}")
    changes = SYSTEMS[name]
    engine = {key.removeprefix("engine."): value for key, value in changes.items() if key.startswith("engine.")}
    own = {key: value for key, value in changes.items() if not key.startswith("engine.")}
    return replace(base, engine=replace(base.engine, **engine), **own)
