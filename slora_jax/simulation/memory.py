"""Builds the pool of a simulated replica: allocator, evictor and residency."""

from __future__ import annotations

from slora_jax.memory import (
    AdapterResidency,
    CostAware,
    EvictionPolicy,
    Evictor,
    Immediate,
    Lru,
    PageAllocator,
    RestoreCosts,
)
from slora_jax.metrics import Counters
from slora_jax.simulation.cost import CostModel
from slora_jax.simulation.system import SystemConfig


def make_residency(
    system: SystemConfig, num_tokens: int, cost: CostModel, counters: Counters | None = None
) -> AdapterResidency:
    """Returns the residency (with evictor and allocator) of one replica with a pool of `num_tokens`, plus
    `system.adapter_tokens` in a split pool."""
    pages = num_tokens // system.page_size
    adapter_pages = None if system.adapter_tokens is None else system.adapter_tokens // system.page_size
    allocator = PageAllocator(1 + pages + (adapter_pages or 0), adapter_pages)
    evictor = Evictor(allocator, _eviction(system, cost), counters)
    return AdapterResidency(evictor, system.slots(allocator.num_pages))


def _eviction(system: SystemConfig, cost: CostModel) -> EvictionPolicy:
    if system.eviction == "immediate":
        return Immediate()
    if system.eviction == "lru":
        return Lru()
    device, efficiency, shape = cost.device, cost.efficiency, cost.shape
    return CostAware(
        RestoreCosts.of(
            parameters=shape.params,
            page_size=system.page_size,
            page_bytes=system.page_size * shape.kv_bytes,
            flops=efficiency.matmul * device.matmul_flops,
            host_to_device=efficiency.host_to_device * device.host_to_device_bandwidth,
            load=efficiency.adapter_load_seconds,
        )
    )
