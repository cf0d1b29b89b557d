"""The engine: batches, the jitted step, sampling, the loop."""

from typing import TYPE_CHECKING

from pallas_kernels.exports import exported

if TYPE_CHECKING:
    from slora_jax.engine.config import EngineConfig
    from slora_jax.engine.engine import Engine
    from slora_jax.engine.outputs import Delta, EngineStats, RequestOutput, TokenLogprobs
    from slora_jax.engine.sizing import adapter_geometry
    from slora_jax.engine.trace import Trace
else:
    __getattr__, __dir__ = exported(
        __name__,
        {
            "slora_jax.engine.config": ("EngineConfig",),
            "slora_jax.engine.engine": ("Engine",),
            "slora_jax.engine.outputs": ("Delta", "EngineStats", "RequestOutput", "TokenLogprobs"),
            "slora_jax.engine.sizing": ("adapter_geometry",),
            "slora_jax.engine.trace": ("Trace",),
        },
    )

__all__ = [
    "Delta",
    "Engine",
    "EngineConfig",
    "EngineStats",
    "RequestOutput",
    "TokenLogprobs",
    "Trace",
    "adapter_geometry",
]
