"""Reading compiled programs: for devices that are there, and for devices that are not."""

from slora_jax.analysis.compiled import PoolUse, pool_use
from slora_jax.analysis.targets import TARGETS, Target, deviceless_mesh

__all__ = ["TARGETS", "PoolUse", "Target", "deviceless_mesh", "pool_use"]
