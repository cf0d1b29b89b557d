"""Systems to simulate: one configuration, of which every baseline changes a part."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from typing import Any, Literal

from slora_jax.errors import ConfigError
from slora_jax.scheduling import POLICIES
from slora_jax.scheduling.config import CoreConfig
from slora_jax.simulation.device import SOFTWARE, DeviceModel
from slora_jax.simulation.lora_cost import LORA_COSTS
from slora_jax.simulation.shape import ModelShape
from slora_jax.simulation.shard import shard_shape
from slora_jax.typed import Count, Positive, checks_keywords, nearest, refuse_unknown

Eviction = Literal["lru", "immediate", "cost_aware"]


@checks_keywords
@dataclass(frozen=True)
class SystemConfig(CoreConfig):
    """A serving system: the settings that it shares with the engine (`CoreConfig`, same defaults), and what its steps
    cost.

    Attributes:
      software: whose efficiencies of the device count. lora: how adapters are computed, a name of `LORA_COSTS`.
      serves_adapters: False ignores the requests' adapters (base model only, or merged weights per replica).
      merged: one adapter at a time is in the base weights; switching merges and unmerges.
      replicas: copies of the system on one device, which they share in time, each with its weights and an equal part of
        the memory; adapter i belongs to replica i.
      lora_collectives: False: what adapters send between devices takes no time (the paper's ablation).
      offline_batch: not a server but the paper's loop around PEFT, with batches of at most so many.
      num_tokens: capacity of the pool in tokens, of each replica, since systems with pages of different sizes are
        compared; None: what gpu_memory_utilization of the device's memory leaves after the weights, and after the pages
        that are in flight beside the steps.
      adapter_tokens: None for a unified pool; else so many tokens' worth of memory is set aside for adapters, beside
        num_tokens for KV.
      gathers_on_load: a load copies all resident adapters (`torch.cat`); those of one step together, once.
      max_num_batched_tokens: None: S-LoRA's max(num_tokens / 6, 3072).
      admit_every, mixed: see `SimulatedScheduler`.
      policy: a name of `POLICIES`, with its default settings.
      overlap: the host plans the next step while the device computes (as this engine); else they take turns.
      eviction: "immediate" drops adapters when their last request ends (S-LoRA), "lru" and "cost_aware" when their
        pages are wanted.
      disk_bandwidth: bytes per second.
    """

    max_num_batched_tokens: Count | None = CoreConfig.max_num_batched_tokens  # type: ignore[assignment]
    name: str = "slora"
    software: str = "jax"
    lora: str = "segmented"
    serves_adapters: bool = True
    merged: bool = False
    replicas: Count = 1
    lora_collectives: bool = True
    offline_batch: Count | None = None
    num_tokens: Count | None = None
    adapter_tokens: Count | None = None
    gathers_on_load: bool = False
    admit_every: Count = 1
    mixed: bool = True
    policy: str = "fcfs"
    overlap: bool = True
    eviction: Eviction = "lru"
    disk_bandwidth: Positive = 2e9

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, allowed in (("software", SOFTWARE), ("lora", LORA_COSTS), ("policy", POLICIES)):
            value = getattr(self, name)
            self.require(value in allowed, name, f"one of {', '.join(allowed)}{nearest(value, allowed)}")
        if self.tensor_parallel_size > 1:
            for name, alone in (
                ("replicas", (1,)),
                ("merged", (False,)),
                ("offline_batch", (None,)),
                ("lora", ("none", "segmented", "mbgmv")),
            ):
                self.require(
                    getattr(self, name) in alone,
                    name,
                    f"{' or '.join(map(repr, alone))} over several devices (tensor_parallel_size="
                    f"{self.tensor_parallel_size})",
                )

    def pool_tokens(self, shape: ModelShape, device: DeviceModel) -> int:
        """Tokens that the pool of one replica holds, of a whole model `shape`.

        Raises:
          ConfigError: the device's memory does not hold the replicas' weights and a page each.
        """
        if self.num_tokens is not None:
            return self.num_tokens
        shape = shard_shape(shape, self.tensor_parallel_size, self.tp_lora)
        memory = self.gpu_memory_utilization * device.memory_bytes / self.replicas
        beside = (self.adapter_tokens or 0) + self._staged_tokens
        left = memory - shape.weight_bytes - beside * shape.kv_bytes
        tokens = int(left / shape.kv_bytes)
        if tokens < self.page_size:
            raise ConfigError(
                f"system {self.name!r} is out of memory: {self.replicas} x {shape.weight_bytes / 1e9:.1f} GB of "
                f"weights in {self.gpu_memory_utilization:g} of the {device.memory_bytes / 1e9:.1f} GB of {device.name}"
            )
        return tokens

    @property
    def _staged_tokens(self) -> int:
        """Tokens' worth of memory that uploads beside the steps take up."""
        return 2 * self.upload_pages_per_step * self.page_size if self.prefetch and self.serves_adapters else 0

    def step_tokens(self, num_tokens: int) -> int:
        """Rows of one step, or of one admission's prompts."""
        return max(num_tokens // 6, 3072) if self.max_num_batched_tokens is None else self.max_num_batched_tokens


SLORA = SystemConfig()
"""This engine, with its defaults: pages of 16 tokens, prompts in chunks along with decoding, optimistic admission,
prefetch, prefix cache, LRU."""

SLORA_PAPER = SystemConfig(
    name="slora-paper",
    software="pytorch",
    lora="mbgmv",
    page_size=1,
    max_num_seqs=1000,
    max_num_batched_tokens=None,
    admission="reserve",
    admit_every=10,
    mixed=False,
    overlap=False,
    prefetch=0,
    prefix_cache=False,
    eviction="immediate",
    host_adapter_bytes=None,
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
        raise ConfigError(f"system {name!r} is unknown{nearest(name, SYSTEMS)}; there are {', '.join(SYSTEMS)}")
    refuse_unknown(settings, [field.name for field in fields(SystemConfig)], f"system {name!r}: ")
    base = SLORA_PAPER if name.endswith("-paper") else SLORA
    return replace(base, **{"name": name, **CHANGES[name.removesuffix("-paper")], **settings})
