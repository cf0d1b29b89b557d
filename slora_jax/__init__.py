"""slora-jax: one base model, thousands of LoRA adapters, one unified paged pool (S-LoRA, arXiv 2311.03285, in JAX)."""

from typing import TYPE_CHECKING

from pallas_kernels.exports import exported
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

if TYPE_CHECKING:
    from slora_jax.adapters import AdapterInfo
    from slora_jax.distributed.follower import Follower
    from slora_jax.distributed.group import ProcessGroup
    from slora_jax.distributed.join import join_processes
    from slora_jax.engine import Delta, Engine, EngineConfig, EngineStats, RequestOutput
    from slora_jax.scheduling import SamplingParams
else:
    __getattr__, __dir__ = exported(
        __name__,
        {
            "slora_jax.adapters": ("AdapterInfo",),
            "slora_jax.engine": ("Delta", "Engine", "EngineConfig", "EngineStats", "RequestOutput"),
            "slora_jax.distributed.join": ("join_processes",),
            "slora_jax.distributed.group": ("ProcessGroup",),
            "slora_jax.distributed.follower": ("Follower",),
            "slora_jax.scheduling": ("SamplingParams",),
        },
    )

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
