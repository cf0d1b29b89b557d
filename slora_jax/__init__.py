"""slora-jax: one base model, thousands of LoRA adapters, one unified paged pool (S-LoRA, arXiv 2311.03285, in JAX)."""

from slora_jax.adapters import AdapterInfo
from slora_jax.engine import Delta, Engine, EngineConfig, EngineStats, Follower, RequestOutput
from slora_jax.errors import (
    AdapterError,
    CheckpointError,
    ConfigError,
    MetricsError,
    PoolError,
    ProcessLostError,
    RequestError,
    SloraError,
    UnsupportedModelError,
)
from slora_jax.parallel.join import join_processes
from slora_jax.parallel.processes import ProcessGroup
from slora_jax.scheduling import SamplingParams

__all__ = [
    "AdapterError",
    "AdapterInfo",
    "CheckpointError",
    "ConfigError",
    "Delta",
    "Engine",
    "EngineConfig",
    "EngineStats",
    "Follower",
    "MetricsError",
    "PoolError",
    "ProcessGroup",
    "ProcessLostError",
    "RequestError",
    "RequestOutput",
    "SamplingParams",
    "SloraError",
    "UnsupportedModelError",
    "join_processes",
]
