"""The mesh of tensor-parallel devices and the shardings on it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache, cached_property
from typing import TYPE_CHECKING, Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from slora_jax.errors import ConfigError
from slora_jax.models.projections import ROW_PARALLEL, STACKS
from slora_jax.parallel.layout import LoraSharding, Shards

if TYPE_CHECKING:
    from slora_jax.models.config import ModelConfig

AXIS = "tp"
"""The mesh axis of all tensor-parallel collectives."""

REPLICATED = P()
POOL = P(None, None, None, AXIS)
"""Sharding of one layer's pool `[num_pages, 2, page_size, W]`."""
PAGES = P(None, None, None, None, AXIS)
"""Sharding of an adapter's pages `[num_layers, n, 2, page_size, W]`."""
LOGITS = P(None, AXIS)
"""Sharding of logits `[S, vocab]`, with the vocabulary rounded up to a multiple of the shards."""

_COLUMNS, _ROWS = P(None, AXIS), P(AXIS, None)
_PARAMETERS = {
    ("embed", "embedding"): _ROWS,
    ("lm_head", "kernel"): _COLUMNS,
    **{(stack, "kernel"): _ROWS if stack in ROW_PARALLEL else _COLUMNS for stack in STACKS},
    **{(stack, "bias"): P(AXIS) for stack in STACKS},
    # A row-parallel stack has a scale on each shard: that of its own groups, or for one group a copy.
    **{(stack, "scale"): _ROWS if stack in ROW_PARALLEL else _COLUMNS for stack in STACKS},
    ("experts", "gate_up"): P(None, None, AXIS),
    ("experts", "gate_up_scale"): P(None, None, AXIS),
    **dict.fromkeys([("experts", "down"), ("experts", "down_scale")], P(None, AXIS, None)),
}


@dataclass(frozen=True)
class TensorParallel:
    """Sharding of a model, and the devices of its shards in order on the one axis of `mesh`."""

    shards: Shards
    mesh: Mesh

    def sharding(self, spec: P) -> NamedSharding:
        return NamedSharding(self.mesh, spec)

    @cached_property
    def replicated(self) -> NamedSharding:
        return self.sharding(REPLICATED)

    @property
    def devices(self) -> list[jax.Device]:
        """The device of each shard."""
        return list(self.mesh.devices.flat)

    def columns(self, width: int, process: int | None = None) -> slice:
        """Columns of `width` that a process's devices hold, contiguous. `process=None` is this process."""
        process = jax.process_index() if process is None else process
        numbers = [i for i, device in enumerate(self.devices) if device.process_index == process]
        size = width // self.shards.count
        return slice(numbers[0] * size, (numbers[-1] + 1) * size)

    def struct(self, leaf: Any, spec: P) -> jax.ShapeDtypeStruct:
        """Returns the global array, sharded by `spec`, of which each shard holds a part shaped like `leaf`."""
        return jax.ShapeDtypeStruct(
            whole_shape(leaf.shape, spec, self.shards), leaf.dtype, sharding=self.sharding(spec)
        )


def parameter_spec(path: tuple[str | int, ...]) -> P:
    """Returns the sharding of the parameter at `path` of the decoder's tree.

    A fused kernel's columns are the shards' fused columns, one shard after the other. The bias of o and down is on
    shard 0, with zeros on the others, because the shards' products are summed.
    """
    return _PARAMETERS.get((str(path[-2]), str(path[-1])), REPLICATED)


def whole_shape(shape: Sequence[int], spec: P, shards: Shards) -> tuple[int, ...]:
    """Returns the global shape of an array whose shards have `shape`."""
    axes = tuple(spec) + (None,) * (len(shape) - len(spec))
    return tuple(size * shards.count if axis else size for size, axis in zip(shape, axes, strict=True))


def make_mesh(count: int, first: int = 0) -> Mesh:
    """Makes a mesh of `count` devices, starting with device number `first`.

    Raises:
      ConfigError: there are too few devices, or there are several processes and the mesh leaves out some devices.
    """
    devices = jax.devices()
    if jax.process_count() > 1 and (first, count) != (0, len(devices)):
        raise ConfigError(
            f"EngineConfig.tensor_parallel_size={count}, tp_first_device={first}: {jax.process_count()} processes must "
            f"use all of their {len(devices)} devices; set tensor_parallel_size={len(devices)} and tp_first_device=0, "
            "or hide devices (CUDA_VISIBLE_DEVICES)"
        )
    if first + count > len(devices):
        have = f"there are {len(devices)} {devices[0].platform} devices"
        raise ConfigError(
            f"EngineConfig.tensor_parallel_size={count}, tp_first_device={first}: {have}; use fewer, or on a CPU add "
            "devices with XLA_FLAGS=--xla_force_host_platform_device_count=N"
        )
    return Mesh(np.array(devices[first : first + count]), (AXIS,), axis_types=(AxisType.Auto,))


def cut(model: ModelConfig, count: int, lora: LoraSharding = "slora") -> Shards:
    """Shards `model` over `count` devices. Raises ConfigError, naming the width, if `count` does not divide it."""
    if count == 1:
        return Shards()
    for field in ("num_heads", "intermediate_size", "hidden_size"):
        size = getattr(model, field)
        if size % count:
            raise ConfigError(
                f"EngineConfig.tensor_parallel_size={count}: the model's {field}={size} must be a multiple of it"
            )
    heads = model.num_kv_heads
    if heads % count and count % heads:
        raise ConfigError(
            f"EngineConfig.tensor_parallel_size={count}: the model's num_kv_heads={heads} must be a multiple of it, or "
            "divide it (then neighbouring shards hold the same head)"
        )
    return Shards(count, min(count, heads), lora)


def tensor_parallel(
    model: ModelConfig, count: int, lora: LoraSharding = "slora", first: int = 0
) -> TensorParallel | None:
    """Shards `model` over `count` devices from number `first` on; None for one. Raises as `cut` and `make_mesh`."""
    return None if count == 1 else _on_devices(cut(model, count, lora), first)


@cache
def _on_devices(shards: Shards, first: int) -> TensorParallel:
    return TensorParallel(shards, make_mesh(shards.count, first))
