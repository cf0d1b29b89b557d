"""The changes of each system to the base settings."""

from __future__ import annotations

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
      peft_batch: requests in a batch of PEFT, at most.
      peft_mixed: whether a batch of PEFT mixes adapters.
    """

    software: str = "engine"
    engine: EngineConfig = field(default_factory=EngineConfig)
    peft_batch: int = 6
    peft_mixed: bool = False

    def __post_init__(self) -> None:
        if self.software not in SOFTWARE:
            raise ConfigError(f"SystemSettings.software={self.software!r}: must be one of {SOFTWARE}")
        if not isinstance(self.peft_batch, int) or self.peft_batch < 1:
            raise ConfigError(f"SystemSettings.peft_batch={self.peft_batch!r}: must be an integer of at least 1")


SYSTEMS: dict[str, dict[str, Any]] = {
    "slora": {},
    "no-unify-mem": {},
    "bmm": {"engine.lora": "bmm"},
    "merge": {"engine.lora": "merge"},
    "packed": {"software": "packed"},
    "base": {"engine.lora": "off"},
    "peft": {"software": "peft"},
    "peft-mixed": {"software": "peft", "peft_mixed": True},
}
"""Name -> changed fields; those of the engine's settings by their dotted name. The memory of no-unify-mem is divided by
`adapter_pages` in the settings themselves."""


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
