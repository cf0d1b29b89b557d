"""Devices to compile for without having them (design: "Checking GPU code without a GPU").

Needs `jax[cuda12]` installed and, in the environment before JAX starts, `JAX_PLATFORMS=cpu` and
`JAX_SKIP_CUDA_CONSTRAINTS_CHECK=1`.
"""

from __future__ import annotations

from dataclasses import dataclass

import jax
from jax.experimental import topologies


@dataclass(frozen=True)
class Target:
    """A GPU by its data sheet: bytes, bytes per second, and XLA's `GpuTargetConfigProto` as text."""

    name: str
    memory_bytes: int
    bandwidth: int
    target_config: str


_H200 = """
gpu_device_info {
  threads_per_block_limit: 1024 threads_per_warp: 32
  shared_memory_per_block: 49152 shared_memory_per_core: 233472 shared_memory_per_block_optin: 232448
  threads_per_core_limit: 2048 core_count: 132 fpus_per_core: 128
  block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
  memory_bandwidth: 4800000000000 l2_cache_size: 52428800 clock_rate_ghz: 1.98 device_memory_size: 150754820096
  cuda_compute_capability { major: 9 } registers_per_core_limit: 65536 registers_per_block_limit: 65536
}
platform_name: "CUDA" dnn_version_info { major: 9 minor: 1 } device_description_str: "NVIDIA H200"
"""

TARGETS = {"h200": Target("h200", 150_754_820_096, 4_800_000_000_000, _H200)}
"""Known targets by name."""


def deviceless_mesh(target: Target, devices: int = 1) -> jax.sharding.Mesh:
    """A mesh of `devices` absent GPUs on one axis, "tp". Lower with arguments sharded over it, for "cuda"."""
    topology = topologies.get_topology_desc(
        target.name, "cuda", target_config=target.target_config, topology=f"1x1x{devices}"
    )
    return topologies.make_mesh(topology, (devices,), ("tp",))
