"""Compilation for absent GPUs.

Needs `jax[cuda12]`, and `JAX_PLATFORMS=cpu` and `JAX_SKIP_CUDA_CONSTRAINTS_CHECK=1` in the environment before JAX
starts.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import jax
from jax.experimental import topologies
from jax.experimental.compilation_cache import compilation_cache
from jax.sharding import NamedSharding, PartitionSpec

from pallas_kernels.devices import DEVICES, Device, compiling_for


@dataclass(frozen=True)
class Target:
    """A GPU as XLA's compiler describes it: a `Device` and further entries of its data sheet.

    Attributes:
      description: XLA's name of the device.
      shared_per_sm: bytes of shared memory of one multiprocessor.
      threads_per_sm: resident threads of one multiprocessor.
      fp32_per_sm: float32 units of one multiprocessor.
      clock_ghz: boost clock.
    """

    device: Device
    description: str
    shared_per_sm: int
    threads_per_sm: int
    fp32_per_sm: int
    clock_ghz: float

    @property
    def name(self) -> str:
        return self.device.name

    @property
    def target_config(self) -> str:
        """XLA's `GpuTargetConfigProto` as text."""
        device = self.device
        major, minor = divmod(device.compute_capability, 10)
        return f"""
gpu_device_info {{
  threads_per_block_limit: 1024 threads_per_warp: 32
  shared_memory_per_block: 49152 shared_memory_per_core: {self.shared_per_sm}
  shared_memory_per_block_optin: {device.shared_bytes}
  threads_per_core_limit: {self.threads_per_sm} core_count: {device.num_sms} fpus_per_core: {self.fp32_per_sm}
  block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
  memory_bandwidth: {int(device.bandwidth)} l2_cache_size: {device.l2_bytes} clock_rate_ghz: {self.clock_ghz}
  device_memory_size: {device.memory_bytes}
  cuda_compute_capability {{ major: {major} minor: {minor} }}
  registers_per_core_limit: 65536 registers_per_block_limit: 65536
  driver_version: "12.9.0" runtime_version: "12.9.0"
}}
platform_name: "CUDA" dnn_version_info {{ major: 9 minor: 1 }} device_description_str: "{self.description}"
"""


TARGETS = {
    target.name: target
    for target in (
        Target(DEVICES["h200"], "NVIDIA H200", 233_472, 2048, 128, 1.98),
        Target(DEVICES["a100"], "NVIDIA A100-SXM4-80GB", 167_936, 2048, 64, 1.41),
        Target(DEVICES["l4"], "NVIDIA L4", 102_400, 1536, 128, 2.04),
    )
}
"""Known targets by name."""


def deviceless_mesh(target: Target, devices: int = 1) -> jax.sharding.Mesh:
    """Returns a mesh of `devices` absent GPUs on one axis, "tp". Lower for "cuda" with arguments sharded over it."""
    topology = topologies.get_topology_desc(
        target.name, "cuda", target_config=target.target_config, topology=f"1x1x{devices}"
    )
    return topologies.make_mesh(topology, (devices,), ("tp",))


def compile_for(target: Target, function: Any, *shapes: Any, options: dict[str, Any] | None = None) -> Any:
    """Compiles a jitted `function` for one or several absent GPUs.

    The result can be read (`as_text`, `memory_analysis`) but not run. It does not enter JAX's persistent compilation
    cache, which cannot load such programs.

    Args:
      shapes: trees of `jax.ShapeDtypeStruct`, all with a sharding, or none (one GPU).
      options: XLA's options by name, in addition to those of `function`.
    """
    options = {"xla_backend_optimization_level": 3} | (options or {})  # XLA's default, whatever XLA_FLAGS says
    with _no_compilation_cache():
        return lower_for(target, function, *shapes).compile(options)


def lower_for(target: Target, function: Any, *shapes: Any) -> jax.stages.Lowered:
    """Lowers a jitted `function` as `compile_for` does, with its Triton kernels compiled. XLA's own code is not."""
    here = NamedSharding(deviceless_mesh(target), PartitionSpec())
    placed = jax.tree.map(lambda s: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=s.sharding or here), shapes)
    with compiling_for(target.device):
        return function.trace(*placed).lower(lowering_platforms=("cuda",))


@contextmanager
def _no_compilation_cache() -> Iterator[None]:
    enabled = jax.config.jax_enable_compilation_cache
    jax.config.update("jax_enable_compilation_cache", False)
    compilation_cache.reset_cache()  # JAX reads the setting once
    try:
        yield
    finally:
        jax.config.update("jax_enable_compilation_cache", enabled)
        compilation_cache.reset_cache()
