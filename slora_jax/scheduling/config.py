"""Settings that the engine and the simulator share: memory, scheduling and devices. The import is light."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

from slora_jax.errors import ConfigError
from slora_jax.parallel.layout import LoraSharding
from slora_jax.typed import Count, Natural, Share, check_fields

Admission = Literal["optimistic", "reserve"]
ADMISSIONS = get_args(Admission)


@dataclass(frozen=True)
class CoreConfig:
    """Settings of an `EngineCore`, whatever executes its plans; `EngineConfig` and the simulator's `SystemConfig` add
    their own.

    Attributes:
      page_size: tokens of a KV page, rows of an adapter tile.
      max_num_seqs: most sequences that run at once.
      max_num_batched_tokens: most rows of one step: decoding sequences, and prompts in chunks.
      admission: "optimistic" admits what fits now, and preempts when pages run out; "reserve" admits what fits with all
        output that it may still have (`Reservation`, as in the paper).
      prefix_cache: requests share the pages of equal beginnings, prompts and earlier answers, under the same adapter.
      adapter_slots: most adapters in the pool at once; None: as many as could fit, at most 4096.
      prefetch: most adapters uploaded ahead of the requests that wait for them, and not used yet. 0: an adapter is
        uploaded before the step that admits its request, which waits for the copy (S-LoRA's scripts).
      upload_pages_per_step: pages of adapters that start their copy to the device beside one step. Twice as many may be
        in flight; they take up device memory beside the pool.
      host_adapter_bytes: budget of the host store; beyond it adapters are on disk. None: no limit (simulation only).
      gpu_memory_utilization: share of the free device memory that the pool may fill, if its size is not given.
      tensor_parallel_size: devices that the model, the pool and the adapters are cut over; 1: no collectives at all.
      tp_lora: how adapters are cut (`parallel.layout`): "slora" (the paper's), "replicated" or "sharded_in".
    """

    page_size: Count = 16
    max_num_seqs: Count = 64
    max_num_batched_tokens: Count = 256
    admission: Admission = "optimistic"
    prefix_cache: bool = True
    adapter_slots: Count | None = None
    prefetch: Natural = 8
    upload_pages_per_step: Count = 32
    host_adapter_bytes: Count | None = 8 << 30
    gpu_memory_utilization: Share = 0.9
    tensor_parallel_size: Count = 1
    tp_lora: LoraSharding = "slora"

    def __post_init__(self) -> None:
        check_fields(self)

    def slots(self, num_pages: int) -> int:
        """Rows of the adapter table of a pool of `num_pages`."""
        return self.adapter_slots or min(num_pages - 1, 4096)

    def require(self, condition: bool, field: str, allowed: str) -> None:
        """Raises ConfigError that names the field and its value unless `condition` holds."""
        if not condition:
            raise ConfigError(f"{type(self).__name__}.{field}={getattr(self, field)!r}: must be {allowed}")
