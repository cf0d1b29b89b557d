"""The GPUs that kernels are planned and compiled for, and which of them the current trace is for."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass


@dataclass(frozen=True)
class Device:
    """name: key of the plan tables. kind: part of JAX's `device_kind` that names it. compute_capability: 80, 89, 90.

    memory_bytes, bandwidth (bytes/s) and matmul_flops (bfloat16 with float32 sums, dense, per second) are from the data
    sheet; shared_bytes is what one block may ask for; l2_bytes the second-level cache.
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
    """Everything traced and lowered in this context is for `device`, which need not be there."""
    token = _target.set(device)
    try:
        yield
    finally:
        _target.reset(token)


def target() -> Device | None:
    """The device that the current trace is for: that of `compiling_for`, else the machine's GPU, else None (a CPU).

    A GPU that is not in `DEVICES` counts as a known one whose kernels it can run; see `known_device`.
    """
    if (device := _target.get()) is not None:
        return device
    import jax

    if jax.default_backend() != "gpu":
        return None
    gpu = jax.devices()[0]
    return known_device(gpu.device_kind, round(10 * float(gpu.compute_capability)))


def known_device(kind: str, compute_capability: int) -> Device | None:
    """The device of `DEVICES` that stands for a GPU of this name and compute capability (80 for 8.0): itself, or one
    with no more shared memory per block and no instruction that it lacks. None, before Ampere."""
    for device in DEVICES.values():
        if re.search(rf"\b{device.kind}\b", kind):
            return device
    stand_in = {80: "a100", 86: "l4", 87: "a100", 89: "l4", 90: "h200", 100: "a100", 103: "a100", 120: "l4", 121: "l4"}
    return DEVICES.get(stand_in.get(compute_capability, ""))


def is_absent() -> bool:
    """Whether the current trace is for a device that is not there."""
    return _target.get() is not None
