"""Systems to simulate: one configuration, of which every baseline changes a part."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from difflib import get_close_matches
from typing import Any

from slora_jax.errors import ConfigError
from slora_jax.scheduling import ADMISSIONS, POLICIES
from slora_jax.simulation.device import SOFTWARE, DeviceModel
from slora_jax.simulation.lora_cost import LORA_COSTS
from slora_jax.simulation.shape import ModelShape

EVICTIONS = ("lru", "immediate", "cost_aware")


@dataclass(frozen=True)
class SystemConfig:
    """A serving system.

    software: whose efficiencies of the device count. lora: how adapters are computed, a name of `LORA_COSTS`.
    serves_adapters: False ignores the requests' adapters (base model only, or merged weights per replica).
    merged: one adapter at a time lies in the base weights; switching merges and unmerges. replicas: copies of the
    system on one device, which they share in time, each with its weights and an equal part of the memory; adapter i
    belongs to replica i. offline_batch: not a server but the paper's loop around PEFT, with batches of at most so many.

    num_tokens: capacity of the pool in tokens, of each replica; None: what memory_fraction of the device's memory
    leaves after the weights. adapter_tokens: None for a unified pool; else so many tokens' worth of memory is set aside
    for adapters, beside num_tokens for KV. gathers_on_load: a load copies all resident adapters (`torch.cat`).

    page_size in tokens, max_seqs, max_tokens, admission, admit_every, mixed: as in `SchedulerLimits`; max_tokens=None
    is S-LoRA's max(num_tokens / 6, 3072). policy: a name of `POLICIES`, with its default settings.

    overlap: the host plans the next step while the device computes (as this engine); else they take turns.
    prefetch: copies of adapters that waiting requests need run ahead, and who waits for one holds up nobody; else a
    step waits for the adapters of its admissions. eviction: "immediate" drops adapters when their last request ends
    (S-LoRA), "lru" and "cost_aware" when their pages are wanted. adapter_slots: resident at once.
    host_bytes: budget of the host store; None: every adapter is in host memory. disk_bandwidth: bytes per second.
    """

    name: str = "slora"
    software: str = "jax"
    lora: str = "segmented"
    serves_adapters: bool = True
    merged: bool = False
    replicas: int = 1
    offline_batch: int | None = None
    num_tokens: int | None = None
    memory_fraction: float = 0.9
    adapter_tokens: int | None = None
    gathers_on_load: bool = False
    page_size: int = 16
    max_seqs: int = 512
    max_tokens: int | None = 2048
    admission: str = "optimistic"
    admit_every: int = 1
    mixed: bool = True
    policy: str = "fcfs"
    overlap: bool = True
    prefetch: bool = True
    eviction: str = "lru"
    adapter_slots: int = 4096
    host_bytes: int | None = None
    disk_bandwidth: float = 2e9

    def __post_init__(self) -> None:
        for name, allowed in (
            ("software", SOFTWARE),
            ("lora", tuple(LORA_COSTS)),
            ("admission", ADMISSIONS),
            ("policy", tuple(POLICIES)),
            ("eviction", EVICTIONS),
        ):
            if getattr(self, name) not in allowed:
                raise ConfigError(f"SystemConfig.{name}={getattr(self, name)!r}: must be one of {', '.join(allowed)}")
        for name in ("replicas", "page_size", "max_seqs", "admit_every", "adapter_slots"):
            self._check_integer(name, getattr(self, name))
        for name in ("num_tokens", "adapter_tokens", "max_tokens", "offline_batch", "host_bytes"):
            if getattr(self, name) is not None:
                self._check_integer(name, getattr(self, name))
        if not 0 < self.memory_fraction <= 1:
            raise ConfigError(f"SystemConfig.memory_fraction={self.memory_fraction!r}: must be in (0, 1]")
        if not self.disk_bandwidth > 0:
            raise ConfigError(f"SystemConfig.disk_bandwidth={self.disk_bandwidth!r}: must be positive")

    def _check_integer(self, name: str, value: Any) -> None:
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise ConfigError(f"SystemConfig.{name}={value!r}: must be a positive integer")

    def pool_tokens(self, shape: ModelShape, device: DeviceModel) -> int:
        """Tokens that the pool of one replica holds.

        Raises:
          ConfigError: the device's memory does not hold the replicas' weights and a page each.
        """
        if self.num_tokens is not None:
            return self.num_tokens
        memory = self.memory_fraction * device.memory_bytes / self.replicas
        left = memory - shape.weight_bytes - (self.adapter_tokens or 0) * shape.kv_bytes
        tokens = int(left / shape.kv_bytes)
        if tokens < self.page_size:
            raise ConfigError(
                f"system {self.name!r} is out of memory: {self.replicas} x {shape.weight_bytes / 1e9:.1f} GB of "
                f"weights in {self.memory_fraction:g} of the {device.memory_bytes / 1e9:.1f} GB of {device.name}"
            )
        return tokens

    def step_tokens(self, num_tokens: int) -> int:
        """Rows of one step, or of one admission's prompts."""
        return max(num_tokens // 6, 3072) if self.max_tokens is None else self.max_tokens


SLORA = SystemConfig()
"""This engine: pages of 16 tokens, prompts in chunks along with decoding, optimistic admission, prefetch, LRU."""

SLORA_PAPER = SystemConfig(
    name="slora-paper",
    software="pytorch",
    lora="mbgmv",
    page_size=1,
    max_seqs=1000,
    max_tokens=None,
    admission="reserve",
    admit_every=10,
    mixed=False,
    overlap=False,
    prefetch=False,
    eviction="immediate",
)
"""The published system, as its committed experiments ran it."""

CHANGES: Mapping[str, Mapping[str, Any]] = {
    "slora": {},
    "no-unify-mem": {"gathers_on_load": True},
    "bmm": {"lora": "bmm"},
    "merge": {"lora": "none", "merged": True, "policy": "one_adapter"},
    "packed": {"lora": "none", "serves_adapters": False},
    "base": {"lora": "none", "serves_adapters": False},
    "peft": {"offline_batch": 6, "software": "peft", "lora": "segmented"},
}
"""What each baseline changes. To be given, as they depend on the device: `num_tokens` of all, `adapter_tokens` of
"no-unify-mem", `replicas` of "packed" (and the paper's, which is vLLM, has software="vllm"). Without `adapter_tokens`,
"no-unify-mem" counts its adapters among `num_tokens` on admission, as S-LoRA's code does though they lie elsewhere."""

SYSTEMS = (*CHANGES, *(f"{name}-paper" for name in CHANGES))
"""Names of `make_system`: each baseline with this engine's scheduling, and ("-paper") with S-LoRA's."""


def make_system(name: str, **settings: Any) -> SystemConfig:
    """A system by its name in `SYSTEMS`: `make_system("bmm-paper", num_tokens=12000)`.

    Raises:
      ConfigError: unknown name or setting (the nearest known one is named), or a value out of range.
    """
    if name not in SYSTEMS:
        raise ConfigError(f"system {name!r} is unknown{_nearest(name, SYSTEMS)}; there are {', '.join(SYSTEMS)}")
    known = [field.name for field in fields(SystemConfig)]
    for setting in settings:
        if setting not in known:
            raise ConfigError(
                f"system {name!r} has no setting {setting!r}{_nearest(setting, known)}; it has {', '.join(known)}"
            )
    base = SLORA_PAPER if name.endswith("-paper") else SLORA
    return replace(base, **{"name": name, **CHANGES[name.removesuffix("-paper")], **settings})


def _nearest(name: str, known: tuple[str, ...] | list[str]) -> str:
    near = get_close_matches(name, known, n=1)
    return f" (did you mean {near[0]!r}?)" if near else ""
