"""The engine: batches, the jitted step, sampling, the loop."""

from slora_jax.engine.config import EngineConfig
from slora_jax.engine.engine import Engine
from slora_jax.engine.follower import Follower
from slora_jax.engine.outputs import Delta, EngineStats, RequestOutput, TokenLogprobs
from slora_jax.engine.runner import adapter_geometry
from slora_jax.engine.trace import Trace

__all__ = [
    "Delta",
    "Engine",
    "EngineConfig",
    "EngineStats",
    "Follower",
    "RequestOutput",
    "TokenLogprobs",
    "Trace",
    "adapter_geometry",
]
