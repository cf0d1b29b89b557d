"""Serving metrics: those of the paper's code, with its definitions, and others. NumPy on the host; no device.

They read plain records, so a real engine, a simulation and another system's logs are measured in the same way.
"""

from slora_jax.metrics.adapters import AdapterMetrics, PoolStay, adapter_metrics
from slora_jax.metrics.counters import Counters
from slora_jax.metrics.distribution import Distribution
from slora_jax.metrics.pool import PAGE_KINDS, PoolPages, PoolSample, PoolUse, pool_use
from slora_jax.metrics.record import FinishReason, RequestRecord
from slora_jax.metrics.serving import (
    SLO_SECONDS,
    WARMUP_SECONDS,
    ServingMetrics,
    attainment,
    satisfaction,
    serving_metrics,
    stripped_throughput,
    throughput,
)

__all__ = [
    "PAGE_KINDS",
    "SLO_SECONDS",
    "WARMUP_SECONDS",
    "AdapterMetrics",
    "Counters",
    "Distribution",
    "FinishReason",
    "PoolPages",
    "PoolSample",
    "PoolStay",
    "PoolUse",
    "RequestRecord",
    "ServingMetrics",
    "adapter_metrics",
    "attainment",
    "pool_use",
    "satisfaction",
    "serving_metrics",
    "stripped_throughput",
    "throughput",
]
