"""Reading compiled programs: for devices that are there, and for devices that are not."""

from slora_jax.analysis.collectives import Collective, collectives_in
from slora_jax.analysis.compiled import PoolUse, pool_use
from slora_jax.analysis.kernels import KernelUse, kernels_in
from slora_jax.analysis.targets import TARGETS, Target, compile_for, deviceless_mesh

__all__ = [
    "TARGETS",
    "Collective",
    "KernelUse",
    "PoolUse",
    "Target",
    "collectives_in",
    "compile_for",
    "deviceless_mesh",
    "kernels_in",
    "pool_use",
]
