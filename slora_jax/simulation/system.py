"""Systems to simulate: one configuration, of which every baseline changes a part."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from difflib import get_close_matches
from typing import Any

from slora_jax.errors import ConfigError
from slora_jax.parallel.layout import LORA_SHARDINGS, LoraSharding
from slora_jax.scheduling import ADMISSIONS, POLICIES
from slora_jax.simulation.device import SOFTWARE, DeviceModel
from slora_jax.simulation.lora_cost import LORA_COSTS
from slora_jax.simulation.shape import ModelShape
from slora_jax.simulation.shard import shard_shape

EVICTIONS = ("lru", "immediate", "cost_aware")


@dataclass(frozen=True)
class SystemConfig:
    """A serving system.

    software: whose efficiencies of the device count. lora: how adapters are computed, a name of `LORA_COSTS`.
    serves_adapters: False ignores the requests' adapters (base model only, or merged weights per replica).
    merged: one adapter at a time lies in the base weights; switching merges and unmerges. replicas: copies of the
    system on one device, which they share in time, each with its weights and an equal part of the memory; adapter i
    belongs to replica i. tp, tp_lora: devices that the model is cut over, and how adapters are (`parallel.layout`); all
    memory is one device's. lora_collectives=False: what adapters send between devices takes no time (the paper's
    ablation). offline_batch: not a server but the paper's loop around PEFT, with batches of at most so many.

    num_tokens: capacity of the pool in tokens, of each replica; None: what memory_fraction of the device's memory
    leaves after the weights, and after the pages that are on their way beside the steps. adapter_tokens: None for a
    unified pool; else so many tokens' worth of memory is set aside for adapters, beside num_tokens for KV.
    gathers_on_load: a load copies all resident adapters (`torch.cat`); those of one step together, once.

    page_size in tokens, max_seqs, max_tokens, admission, admit_every, mixed: as in `SchedulerLimits`; max_tokens=None
    is S-LoRA's max(num_tokens / 6, 3072). policy: a name of `POLICIES`, with its default settings.

    overlap: the host plans the next step while the device computes (as this engine); else they take turns.
    prefetch, upload_pages: as in `SchedulerLimits`; with prefetch=0 a step waits for the adapters of its admissions.
    prefix_cache: equal beginnings (`SimulatedRequest.prefix`) share pages. eviction: "immediate" drops adapters when
    their last request ends (S-LoRA), "lru" and "cost_aware" when their pages are wanted. adapter_slots: resident at
    once.
    host_bytes: budget of the host store; None: every adapter is in host memory. disk_bandwidth: bytes per second.
    """

    name: str = "slora"
    software: str = "jax"
    lora: str = "segmented"
    serves_adapters: bool = True
    merged: bool = False
    replicas: int = 1
    tp: int = 1
    tp_lora: LoraSharding = "slora"
    lora_collectives: bool = True
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
    prefetch: int = 8
    upload_pages: int = 32
    prefix_cache: bool = False
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
            ("tp_lora", LORA_SHARDINGS),
        ):
            if getattr(self, name) not in allowed:
                raise ConfigError(f"SystemConfig.{name}={getattr(self, name)!r}: must be one of {', '.join(allowed)}")
        for name in ("tp", "replicas", "page_size", "max_seqs", "admit_every", "adapter_slots", "upload_pages"):
            self._check_integer(name, getattr(self, name))
        self._check_integer("prefetch", self.prefetch, least=0)
        for name in ("num_tokens", "adapter_tokens", "max_tokens", "offline_batch", "host_bytes"):
            if getattr(self, name) is not None:
                self._check_integer(name, getattr(self, name))
        if not 0 < self.memory_fraction <= 1:
            raise ConfigError(f"SystemConfig.memory_fraction={self.memory_fraction!r}: must be in (0, 1]")
        if not self.disk_bandwidth > 0:
            raise ConfigError(f"SystemConfig.disk_bandwidth={self.disk_bandwidth!r}: must be positive")
        if self.tp > 1:
            for name, allowed in (("replicas", (1,)), ("merged", (False,)), ("offline_batch", (None,))):
                self._check_alone(name, allowed)
            self._check_alone("lora", ("none", "segmented", "mbgmv"))

    def _check_alone(self, name: str, allowed: tuple[Any, ...]) -> None:
        if getattr(self, name) not in allowed:
            raise ConfigError(
                f"SystemConfig.{name}={getattr(self, name)!r}: must be {' or '.join(map(repr, allowed))} over several "
                f"devices (tp={self.tp})"
            )

    def _check_integer(self, name: str, value: Any, least: int = 1) -> None:
        if not isinstance(value, int) or isinstance(value, bool) or value < least:
            raise ConfigError(f"SystemConfig.{name}={value!r}: must be an integer of at least {least}")

    def pool_tokens(self, shape: ModelShape, device: DeviceModel) -> int:
        """Tokens that the pool of one replica holds, of a whole model `shape`.

        Raises:
          ConfigError: the device's memory does not hold the replicas' weights and a page each.
        """
        if self.num_tokens is not None:
            return self.num_tokens
        shape = shard_shape(shape, self.tp, self.tp_lora)
        memory = self.memory_fraction * device.memory_bytes / self.replicas
        beside = (self.adapter_tokens or 0) + self._staged_tokens
        left = memory - shape.weight_bytes - beside * shape.kv_bytes
        tokens = int(left / shape.kv_bytes)
        if tokens < self.page_size:
            raise ConfigError(
                f"system {self.name!r} is out of memory: {self.replicas} x {shape.weight_bytes / 1e9:.1f} GB of "
                f"weights in {self.memory_fraction:g} of the {device.memory_bytes / 1e9:.1f} GB of {device.name}"
            )
        return tokens

    @property
    def _staged_tokens(self) -> int:
        """Tokens' worth of memory that uploads beside the steps take up."""
        return 2 * self.upload_pages * self.page_size if self.prefetch and self.serves_adapters else 0

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
    prefetch=0,
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
