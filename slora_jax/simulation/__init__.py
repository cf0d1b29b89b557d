"""Simulates the engine's scheduler, allocator, residency and policies with a cost model on a virtual clock.

`simulate` serves `SimulatedRequest`s on a `SystemConfig` (from `make_system`: this engine, the published system, and
the baselines of both), a `ModelShape` and a `DeviceModel` (from `load_device`), and returns records for
`slora_jax.metrics`. The cost model is a roofline with fitted efficiencies; validate it before relying on it.
"""

from slora_jax.simulation.arrivals import Arrivals
from slora_jax.simulation.cost import CostModel
from slora_jax.simulation.device import DeviceModel, Efficiency, devices, load_device
from slora_jax.simulation.request import SimulatedRequest, SimulationResult
from slora_jax.simulation.shape import ModelShape
from slora_jax.simulation.shard import shard_shape
from slora_jax.simulation.simulate import simulate
from slora_jax.simulation.system import SYSTEMS, SystemConfig, make_system
from slora_jax.simulation.work import StepWork

__all__ = [
    "SYSTEMS",
    "Arrivals",
    "CostModel",
    "DeviceModel",
    "Efficiency",
    "ModelShape",
    "SimulatedRequest",
    "SimulationResult",
    "StepWork",
    "SystemConfig",
    "devices",
    "load_device",
    "make_system",
    "shard_shape",
    "simulate",
]
