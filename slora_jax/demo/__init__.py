"""The demo: hundreds of adapters of one small model, served from one pool, their answers checked by merged weights."""

from slora_jax.demo.run import DemoSettings, run_demo

__all__ = ["DemoSettings", "run_demo"]
