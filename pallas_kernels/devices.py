"""The GPUs that kernels are planned and compiled for, and the target of the current trace."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, replace


@dataclass(frozen=True)
class Device:
    """A GPU's data sheet.

    Attributes:
      name: key of the plan tables.
      kind: the part of JAX's `device_kind` that identifies it.
      compute_capability: 80, 89 or 90.
      num_sms: multiprocessors.
      memory_bytes: device memory.
      bandwidth: of the memory, bytes per second.
      matmul_flops: dense bfloat16 products with float32 sums, operations per second.
      shared_bytes: largest shared memory of one block.
      l2_bytes: second-level cache.
    """

    name: str
    kind: str
    compute_capability: int
    num_sms: int
    memory_bytes: int
    bandwidth: float
    matmul_flops: float
    shared_bytes: int
    l2_bytes: int


DEVICES = {
    device.name: device
    for device in (
        Device("h200", "H200", 90, 132, 150_754_820_096, 4.8e12, 989e12, 232_448, 52_428_800),
        Device("a100", "A100", 80, 108, 85_899_345_920, 2.039e12, 312e12, 166_912, 41_943_040),
        Device("l4", "L4", 89, 58, 24_152_899_584, 0.300e12, 121e12, 101_376, 50_331_648),
    )
}
"""Known devices by name."""

_target: ContextVar[Device | None] = ContextVar("target", default=None)


@contextmanager
def compiling_for(device: Device) -> Iterator[None]:
    """Context in which programs are traced and lowered for `device`, which need not be present."""
    token = _target.set(device)
    try:
        yield
    finally:
        _target.reset(token)


def target() -> Device | None:
    """Returns the device of the current trace: that of `compiling_for`, else the machine's GPU, else None (a CPU).

    A GPU that is not in `DEVICES` is replaced by a compatible one (see `known_device`) with its own multiprocessors.
    """
    if (device := _target.get()) is not None:
        return device
    import jax

    if jax.default_backend() != "gpu":
        return None
    gpu = jax.devices()[0]
    device = known_device(gpu.device_kind, round(10 * float(gpu.compute_capability)))
    return device and replace(device, num_sms=getattr(gpu, "core_count", device.num_sms))


def known_device(kind: str, compute_capability: int) -> Device | None:
    """Returns the device of `DEVICES` for a GPU of this name and compute capability (80 for 8.0): the same GPU, or one
    with at most its shared memory per block and only instructions that it has. None before Ampere."""
    for device in DEVICES.values():
        if re.search(rf"\b{device.kind}\b", kind):
            return device
    stand_in = {80: "a100", 86: "l4", 87: "a100", 89: "l4", 90: "h200", 100: "a100", 103: "a100", 120: "l4", 121: "l4"}
    return DEVICES.get(stand_in.get(compute_capability, ""))


def is_absent() -> bool:
    """Returns whether the current trace is for a device that need not be present."""
    return _target.get() is not None
