"""The comparisons on the real engine."""

from __future__ import annotations

from functools import partial
from typing import Any

from experiments.mechanisms import loads
from experiments.mechanisms.scale import Scale
from experiments.mechanisms.sides import Load, Side, side_by_side
from experiments.slow_disk import slow_disk
from slora_jax.memory import CostAware, Immediate, RestoreCosts
from slora_jax.simulation import ModelShape

CPU_FLOPS, CPU_COPY = 2e10, 4e9
"""Assumed of a CPU under `CostAware`: operations, and bytes copied to the pool, per second."""


def prefetch(scale: Scale) -> dict[str, Any]:
    """8 adapters brought ahead, against none, from a disk that takes its time and from one that does not."""
    hot = frozenset(f"{i}" for i in range(loads.HOT))
    cold = frozenset(f"{i}" for i in range(loads.HOT, scale.adapters))

    def load(name: str, seconds: float) -> Load:
        requests, around = partial(loads.mostly_cold, scale), partial(slow_disk, seconds)
        return Load(name, requests, timed=True, around=around, groups={"cold": cold, "hot": hot})

    sides = [
        Side(f"prefetch {n}", {"prefetch": n, "host_adapter_bytes": scale.small_memory, "prefix_cache": False})
        for n in (8, 0)
    ]
    return side_by_side(scale, sides, [load("slow disk", scale.disk_seconds), load("fast disk", 0.0)], "prefetch")


def memory(scale: Scale) -> dict[str, Any]:
    """One pool, against the same pool with a part of it set aside for adapters."""
    pages = scale.engine.num_pages
    assert pages is not None
    sides = [Side("unified", {"prefix_cache": False})]
    for share in scale.splits:
        changes = {"adapter_pages": int(share * (pages - 1)), "prefix_cache": False}
        sides.append(Side(f"{100 * share:.0f}% for adapters", changes))
    phases = [
        Load("many adapters, short prompts", partial(loads.many_adapters, scale)),
        Load("two adapters, long prompts", partial(loads.long_prompts, scale)),
        Load("shifting", partial(loads.shifting, scale)),
    ]
    return side_by_side(scale, sides, phases, "memory")


def prefix(scale: Scale) -> dict[str, Any]:
    """Prefix cache on against off, where prompts begin with their adapter's instructions."""
    sides = [Side("prefix cache", {"prefix_cache": True}), Side("none", {"prefix_cache": False})]
    return side_by_side(scale, sides, [Load("shared instructions", partial(loads.instructed, scale))], "prefix")


def eviction(scale: Scale) -> dict[str, Any]:
    """What idle adapters and prefixes leave the pool first."""
    sides = [
        Side("lru"),
        Side("immediate", eviction=Immediate),
        Side("cost-aware", eviction=partial(_cost_aware, scale)),
    ]
    return side_by_side(scale, sides, [Load("conversations", partial(loads.conversations, scale))], "eviction")


def _cost_aware(scale: Scale) -> CostAware:
    shape = ModelShape.of(scale.model, dtype_bytes=4)
    page_size = scale.engine.page_size
    return CostAware(RestoreCosts.of(shape.params, page_size, page_size * shape.kv_bytes, CPU_FLOPS, CPU_COPY))


COMPARISONS = {"prefetch": prefetch, "memory": memory, "prefix": prefix, "eviction": eviction}
