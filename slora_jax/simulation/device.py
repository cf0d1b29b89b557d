"""Devices: data-sheet ceilings, and the share of them that each software reaches."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from importlib.resources import files
from pathlib import Path
from typing import Any

from slora_jax.errors import ConfigError
from slora_jax.typed import Positive, Seconds, Share, check_fields

SOFTWARE = ("pytorch", "vllm", "peft", "jax")
"""Software with efficiencies in every device file: S-LoRA and the systems it emulates (PyTorch, Triton and CUDA kernels
launched one by one from Python), vLLM, Hugging Face PEFT, and this engine (one compiled program per step)."""


@dataclass(frozen=True)
class Efficiency:
    """Shares of a device's ceilings that software reaches, in (0, 1], and its overheads in seconds.

    `link` and `collective_seconds` are assumed, since no run of the paper determines them.

    Attributes:
      matmul: share of matmul_flops in products with base weights.
      bandwidth: share of memory_bandwidth when reading base weights and copying.
      attention: share of memory_bandwidth when reading KV.
      prefill_attention: share of matmul_flops in the attention of prompts.
      lora: share of memory_bandwidth when reading adapters.
      lora_reread: cost of rereading an adapter for another sequence of the step (from cache), relative to the first.
      lora_flops: share of vector_flops.
      host_to_device: share of host_to_device_bandwidth.
      step_seconds: per step, on the device lane.
      layer_seconds: minimum time of a layer (its kernel launches).
      lora_layer_seconds: added to that minimum with adapters.
      adapter_load_seconds: host calls per loaded adapter, on the copy lane.
      allocation_seconds: per step that returns its memory to the driver and allocates it again.
      launch_seconds: per additional small kernel or copy.
      host_step_seconds: host work per step.
      host_sequence_seconds: host work per sequence in a step.
      adapter_wrap_seconds: time to wrap the base model in another adapter (`get_peft_model`).
      link: share of link_bandwidth in collectives.
      collective_seconds: minimum time of a collective; for PyTorch, one more kernel launch.
    """

    matmul: Share
    bandwidth: Share
    attention: Share
    prefill_attention: Share
    lora: Share
    lora_reread: Share
    lora_flops: Share
    host_to_device: Share
    step_seconds: Seconds
    layer_seconds: Seconds
    lora_layer_seconds: Seconds
    adapter_load_seconds: Seconds
    allocation_seconds: Seconds
    launch_seconds: Seconds
    host_step_seconds: Seconds
    host_sequence_seconds: Seconds
    adapter_wrap_seconds: Seconds = 0.0
    link: Share = 1.0
    collective_seconds: Seconds = 0.0

    def __post_init__(self) -> None:
        check_fields(self)


@dataclass(frozen=True)
class DeviceModel:
    """A device: its data-sheet ceilings and the efficiency of each software.

    Attributes:
      memory_bandwidth: bytes per second.
      matmul_flops: dense float16 (or bfloat16) operations per second of the matrix units.
      vector_flops: float32 operations per second of the other units.
      host_to_device_bandwidth: bytes per second, one way.
      link_bandwidth: bytes per second to the other devices of a group, one way.
      efficiency: by software.
    """

    name: str
    memory_bytes: Positive
    memory_bandwidth: Positive
    matmul_flops: Positive
    vector_flops: Positive
    host_to_device_bandwidth: Positive
    link_bandwidth: Positive
    efficiency: Mapping[str, Efficiency]

    def __post_init__(self) -> None:
        check_fields(self)
        missing = [name for name in SOFTWARE if name not in self.efficiency]
        if missing:
            raise ConfigError(f"DeviceModel.efficiency of {self.name!r} lacks {', '.join(missing)}")

    def fitted(self, software: str, **changes: float) -> DeviceModel:
        """Returns this device with some efficiencies of one software changed."""
        try:
            changed = replace(self.efficiency[software], **changes)
        except KeyError:
            raise ConfigError(f"software={software!r}: must be one of {SOFTWARE}") from None
        except TypeError as error:
            raise ConfigError(f"{error}; efficiencies are {', '.join(f.name for f in fields(Efficiency))}") from None
        return replace(self, efficiency={**self.efficiency, software: changed})


def devices() -> list[str]:
    """Names of the devices supplied with the package."""
    return sorted(file.name.removesuffix(".json") for file in _directory().iterdir() if file.name.endswith(".json"))


def load_device(name: str) -> DeviceModel:
    """Loads a device by its name in `devices()` or by the path of a device file.

    Raises:
      ConfigError: the file does not exist or does not describe a device.
    """
    file = _directory() / f"{name}.json"
    if not file.is_file():
        file = Path(name)
    if not file.is_file():
        raise ConfigError(f"device {name!r} is unknown; there are {', '.join(devices())}, and paths of such files")
    try:
        return read_device(file.name.removesuffix(".json"), json.loads(file.read_text()))
    except json.JSONDecodeError as error:
        raise ConfigError(f"device {name!r}: {error}") from error


def read_device(name: str, content: Mapping[str, Any]) -> DeviceModel:
    """Reads a device file's content: "data_sheet" maps each ceiling to `{"value", "source"}`, "efficiency" maps each
    software to the fields of `Efficiency`."""
    try:
        ceilings = {field: entry["value"] for field, entry in content["data_sheet"].items()}
        efficiency = {software: Efficiency(**shares) for software, shares in content["efficiency"].items()}
        return DeviceModel(name, **ceilings, efficiency=efficiency)
    except (KeyError, TypeError) as error:
        raise ConfigError(f"device {name!r}: {error}") from error


def _directory() -> Any:
    return files("slora_jax.simulation") / "devices"
