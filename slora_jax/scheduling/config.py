"""Settings shared by the engine and the simulator: memory, scheduling and devices. Imports no JAX."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

from slora_jax.errors import ConfigError
from slora_jax.parallel.layout import LoraSharding
from slora_jax.typed import Count, Natural, Share, check_fields

Admission = Literal["optimistic", "reserve"]
ADMISSIONS = get_args(Admission)

KvDtype = Literal["auto", "fp8", "int8"]
KV_DTYPES = get_args(KvDtype)

Weights = Literal["auto", "int8", "fp8", "int4"]
WEIGHTS = get_args(Weights)


@dataclass(frozen=True)
class CoreConfig:
    """Settings of an `EngineCore` with any executor; base class of `EngineConfig` and the simulator's `SystemConfig`.

    Attributes:
      page_size: tokens per KV page, and rows per adapter tile (half as many with a narrow `kv_dtype`).
      kv_dtype: keys and values in the pool: "fp8" (e4m3) or "int8" (a scale for each token and head) take one byte an
        element; "auto" is the model's dtype.
      weights: format of the layers' kernels (docs/quantisation.md): "int8", "fp8" or "int4"; "auto" is the
        checkpoint's own. Embedding, head, norms, biases and routers keep the model's dtype.
      max_num_seqs: maximum number of running sequences.
      max_num_batched_tokens: maximum tokens per step, decode and chunked prefill together.
      admission: "optimistic" admits requests that fit now and preempts when pages run out; "reserve" admits a request
        only if the pool can hold all output still to come (`Reservation`, as in the paper).
      prefix_cache: whether requests for the same adapter share the KV pages of a common prefix.
      adapter_slots: maximum number of adapters in the pool; None allows as many as fit, up to 4096.
      prefetch: maximum number of adapters uploaded for waiting requests and not used yet. With 0, an adapter is
        uploaded before the step that admits its request, and the step waits for the copy (as in S-LoRA's scripts).
      upload_pages_per_step: maximum adapter pages whose copy to the device starts with one step. Up to twice as many
        are in flight, in device memory outside the pool.
      host_adapter_bytes: host memory for adapters, bytes; the others are on disk. None is unlimited (simulation only).
      gpu_memory_utilization: fraction of the free device memory that the pool fills if its size is not given.
      tensor_parallel_size: number of devices that share the model, the pool and the adapters; 1 uses no collectives.
      tp_lora: how adapters are sharded (`parallel.layout`): "slora" (the paper's), "replicated" or "sharded_in".
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
    kv_dtype: KvDtype = "auto"
    weights: Weights = "auto"

    def __post_init__(self) -> None:
        check_fields(self)

    def slots(self, num_pages: int) -> int:
        """Returns the rows of the adapter table for a pool of `num_pages`."""
        return self.adapter_slots or min(num_pages - 1, 4096)

    def require(self, condition: bool, field: str, allowed: str) -> None:
        """Raises a ConfigError that names `field`, its value and the `allowed` range, unless `condition` holds."""
        if not condition:
            raise ConfigError(f"{type(self).__name__}.{field}={getattr(self, field)!r}: must be {allowed}")
