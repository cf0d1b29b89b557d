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
    from slora_jax.distributed import Follower, ProcessGroup, join_processes
    from slora_jax.engine import Delta, Engine, EngineConfig, EngineStats, RequestOutput
    from slora_jax.scheduling import SamplingParams, StructuredOutputs
else:
    __getattr__, __dir__, __all__ = exported(
        __name__,
        adapters="AdapterInfo",
        engine="Delta Engine EngineConfig EngineStats RequestOutput",
        distributed="join_processes ProcessGroup Follower",
        scheduling="SamplingParams StructuredOutputs",
    )
    __all__ += [name for name, value in vars().items() if isinstance(value, type) and issubclass(value, SloraError)]
