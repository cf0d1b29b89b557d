"""The demo: serves hundreds of adapters of a small model from one pool and checks answers with merged weights."""

from typing import TYPE_CHECKING

from pallas_kernels.exports import exported

if TYPE_CHECKING:
    from slora_jax.demo.run import run_demo
    from slora_jax.demo.settings import DemoSettings
else:
    __getattr__, __dir__, __all__ = exported(
        __name__,
        run="run_demo",
        settings="DemoSettings",
    )
