"""The engine: the step loop, batches, the jitted step and sampling."""

from typing import TYPE_CHECKING

from pallas_kernels.exports import exported

if TYPE_CHECKING:
    from slora_jax.engine.config import EngineConfig
    from slora_jax.engine.engine import Engine
    from slora_jax.engine.outputs import Delta, EngineStats, RequestOutput, TokenLogprobs
    from slora_jax.engine.sizing import adapter_geometry
    from slora_jax.engine.trace import Trace
else:
    __getattr__, __dir__, __all__ = exported(
        __name__,
        config="EngineConfig",
        engine="Engine",
        outputs="Delta EngineStats RequestOutput TokenLogprobs",
        sizing="adapter_geometry",
        trace="Trace",
    )
