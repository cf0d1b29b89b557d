"""Readers of compiled programs, for present and absent devices."""

from slora_jax.analysis.collectives import Collective, collectives_in
from slora_jax.analysis.compiled import PoolUse, pool_use
from slora_jax.analysis.hlo import launches
from slora_jax.analysis.kernels import KernelUse, kernels_in

__all__ = ["Collective", "KernelUse", "PoolUse", "collectives_in", "kernels_in", "launches", "pool_use"]
