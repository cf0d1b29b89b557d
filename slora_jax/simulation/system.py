"""Systems to simulate: this engine, the published S-LoRA, and baselines that change a few of their settings."""

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
    """A serving system: the engine's settings (`CoreConfig`, same defaults), and settings for the cost of its steps.

    Attributes:
      max_num_batched_tokens: most rows of a step; None: S-LoRA's max(num_tokens / 6, 3072).
      software: name in `SOFTWARE` that selects the device's efficiencies.
      lora: name in `LORA_COSTS` that selects how adapters are computed.
      serves_adapters: False ignores the requests' adapters (base model only, or merged weights per replica).
      merged: the base weights contain one adapter at a time; a switch unmerges and merges.
      replicas: copies of the system that share one device in time, each with its own weights and an equal part of the
        memory; replica i serves adapter i.
      lora_collectives: adapters' traffic between devices takes time; False is the paper's ablation.
      offline_batch: largest batch of the paper's offline loop around PEFT, which replaces the server; None: a server.
      num_tokens: capacity of each replica's pool, in tokens, to compare systems with different page sizes; None: the
        part of gpu_memory_utilization of the device's memory that weights and uploads in flight leave.
      adapter_tokens: memory reserved for adapters in addition to num_tokens for KV, in tokens; None: a unified pool.
      gathers_on_load: loads copy all resident adapters (`torch.cat`), once per step.
      admit_every, mixed: see `SimulatedScheduler`.
      policy: name in `POLICIES`, with its default settings.
      overlap: the host plans the next step while the device computes, as in this engine.
      eviction: "immediate" evicts an adapter when its last request ends (S-LoRA); "lru" and "cost_aware" evict when
        pages are needed.
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
        if self.kv_dtype != "auto":
            self.require(self.page_size % 2 == 0, "page_size", f"even with kv_dtype={self.kv_dtype!r}")
        self.require(not self.merged or self.weights == "auto", "weights", "'auto' with merged adapters")
        if self.tensor_parallel_size > 1:
            for name, choices in (
                ("replicas", (1,)),
                ("merged", (False,)),
                ("offline_batch", (None,)),
                ("lora", ("none", "segmented", "mbgmv")),
            ):
                self.require(
                    getattr(self, name) in choices,
                    name,
                    f"{' or '.join(map(repr, choices))} over several devices (tensor_parallel_size="
                    f"{self.tensor_parallel_size})",
                )

    def pool_tokens(self, shape: ModelShape, device: DeviceModel) -> int:
        """Capacity of one replica's pool, in tokens, for a whole (unsharded) model `shape`.

        Raises:
          ConfigError: the device's memory cannot hold each replica's weights and one page.
        """
        if self.num_tokens is not None:
            return self.num_tokens
        shape = self.shard_of(shape)
        memory = self.gpu_memory_utilization * device.memory_bytes / self.replicas
        reserved = (self.adapter_tokens or 0) + self._staged_tokens
        available = memory - shape.weight_bytes - reserved * shape.kv_bytes
        tokens = int(available / shape.kv_bytes)
        if tokens < self.page_size:
            raise ConfigError(
                f"system {self.name!r} is out of memory: {self.replicas} x {shape.weight_bytes / 1e9:.1f} GB of "
                f"weights in {self.gpu_memory_utilization:g} of the {device.memory_bytes / 1e9:.1f} GB of {device.name}"
            )
        return tokens

    def shard_of(self, shape: ModelShape) -> ModelShape:
        """One device's part of a whole model, with this system's `kv_dtype` and `weights`."""
        weights = shape.weights if self.weights == "auto" else self.weights
        whole = replace(shape, kv_dtype=self.kv_dtype, weights=weights)
        return shard_shape(whole, self.tensor_parallel_size, self.tp_lora)

    @property
    def _staged_tokens(self) -> int:
        """Memory of uploads in flight, in tokens."""
        return 2 * self.upload_pages_per_step * self.page_size if self.prefetch and self.serves_adapters else 0

    def step_tokens(self, num_tokens: int) -> int:
        """Most rows of one step or, without `mixed`, of one admission's prompts."""
        return max(num_tokens // 6, 3072) if self.max_num_batched_tokens is None else self.max_num_batched_tokens


SLORA = SystemConfig()
"""This engine with its defaults: pages of 16 tokens, chunked prefill mixed with decoding, optimistic admission,
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
"""The published S-LoRA, with the settings of its committed experiments."""

CHANGES: Mapping[str, Mapping[str, Any]] = {
    "slora": {},
    "no-unify-mem": {"gathers_on_load": True},
    "bmm": {"lora": "bmm"},
    "merge": {"lora": "none", "merged": True, "policy": "one_adapter"},
    "packed": {"lora": "none", "serves_adapters": False},
    "base": {"lora": "none", "serves_adapters": False},
    "peft": {"offline_batch": 6, "software": "peft", "lora": "segmented"},
}
"""Settings that each baseline changes.

Settings that depend on the device must be given: `num_tokens` for all, `adapter_tokens` for "no-unify-mem", `replicas`
for "packed". The paper's "packed" is vLLM, which needs software="vllm" too. Without `adapter_tokens`, "no-unify-mem"
counts adapters against `num_tokens` on admission, as S-LoRA's code does although it stores them separately."""

SYSTEMS = (*CHANGES, *(f"{name}-paper" for name in CHANGES))
"""Names for `make_system`: each baseline with this engine's scheduling or, with "-paper", S-LoRA's."""


def make_system(name: str, **settings: Any) -> SystemConfig:
    """Returns a system by its name in `SYSTEMS`, e.g. `make_system("bmm-paper", num_tokens=12000)`.

    Raises:
      ConfigError: the name or a setting is unknown, or a value is out of range.
    """
    if name not in SYSTEMS:
        raise ConfigError(f"system {name!r} is unknown{nearest(name, SYSTEMS)}; there are {', '.join(SYSTEMS)}")
    refuse_unknown(settings, [field.name for field in fields(SystemConfig)], f"system {name!r}: ")
    base = SLORA_PAPER if name.endswith("-paper") else SLORA
    return replace(base, **{"name": name, **CHANGES[name.removesuffix("-paper")], **settings})
