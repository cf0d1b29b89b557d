"""The unified pool: device arrays and their pure updates, page allocator, adapter residency, eviction, prefix cache."""

from typing import TYPE_CHECKING

from pallas_kernels.exports import exported

if TYPE_CHECKING:
    from slora_jax.memory.allocator import DUMMY_PAGE, PageAllocator, PageKind
    from slora_jax.memory.eviction import CostAware, EvictionPolicy, Evictor, Immediate, Lru, RestoreCosts
    from slora_jax.memory.pool import Pool, PoolShape, upload_adapter
    from slora_jax.memory.prefix import PrefixCache, PrefixNode
    from slora_jax.memory.residency import AdapterResidency, Resident, Upload, pool_pages
else:
    __getattr__, __dir__, __all__ = exported(
        __name__,
        allocator="DUMMY_PAGE PageAllocator PageKind",
        eviction="CostAware EvictionPolicy Evictor Immediate Lru RestoreCosts",
        pool="Pool PoolShape upload_adapter",
        prefix="PrefixCache PrefixNode",
        residency="AdapterResidency Resident Upload pool_pages",
    )
