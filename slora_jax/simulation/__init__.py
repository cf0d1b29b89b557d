"""The simulated runner: the engine's scheduler, allocator, residency and policies over a cost model on a virtual clock.

`simulate` serves a workload of `SimulatedRequest`s on a `SystemConfig` (`make_system`: this engine, the published
system, and the baselines of both), a `ModelShape` and a `DeviceModel` (`load_device`), and returns the records that
`slora_jax.metrics` measures. The cost model is a roofline with fitted efficiencies: to be validated, not trusted.
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
