"""Devices: what the data sheet says, and what of it software reaches."""

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
"""Whose efficiencies a device file has: S-LoRA and what it emulates (PyTorch, Triton and CUDA, launched kernel by
kernel from Python), vLLM, Hugging Face PEFT, and this engine (a compiled program per step)."""


@dataclass(frozen=True)
class Efficiency:
    """Shares of a device's ceilings that software reaches, in (0, 1], and its overheads in seconds.

    matmul: of matmul_flops, in products with base weights. bandwidth: of memory_bandwidth, reading base weights and
    copying. attention: of memory_bandwidth, reading KV. prefill_attention: of matmul_flops, scores and values of
    prompts. lora: of memory_bandwidth, reading adapters; lora_reread: what another sequence's reading of the
    same adapter costs in a step, of the first (the cache serves it). lora_flops: of vector_flops. host_to_device: of
    host_to_device_bandwidth. link: of link_bandwidth, in collectives.

    step_seconds: once a step, on the device lane. layer_seconds: least time of a layer, however little it computes (its
    kernels' launches). lora_layer_seconds: as much more with adapters. launch_seconds: one more small kernel or copy.
    allocation_seconds: of a step that gives its memory back to the driver and allocates anew. adapter_load_seconds:
    per adapter loaded, on the copy lane (the host's calls). collective_seconds: of a collective, however little it
    sends (set, as is link: no run of the paper tells them; PyTorch's as one more kernel's).
    adapter_wrap_seconds: to put another adapter around the
    base model (`get_peft_model`). host_step_seconds, host_sequence_seconds: the host's work in a step, and per sequence
    in it.
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
    """A device: its data sheet, and what software reaches of it.

    memory_bytes; memory_bandwidth in bytes per second; matmul_flops: dense float16 (or bfloat16) operations per second
    of the matrix units; vector_flops: float32 operations per second of the others; host_to_device_bandwidth in bytes
    per second, one way; link_bandwidth, to the other devices of a group, likewise. efficiency: by software.
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
        """This device with some efficiencies of one software changed."""
        try:
            changed = replace(self.efficiency[software], **changes)
        except KeyError:
            raise ConfigError(f"software={software!r}: must be one of {SOFTWARE}") from None
        except TypeError as error:
            raise ConfigError(f"{error}; efficiencies are {', '.join(f.name for f in fields(Efficiency))}") from None
        return replace(self, efficiency={**self.efficiency, software: changed})


def devices() -> list[str]:
    """Names that `load_device` knows."""
    return sorted(file.name.removesuffix(".json") for file in _directory().iterdir() if file.name.endswith(".json"))


def load_device(name: str) -> DeviceModel:
    """A device by its name in `devices()`, or by the path of a file of one's own.

    Raises:
      ConfigError: there is no such file, or it does not describe a device.
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
    """A device from the content of a file: "data_sheet" has `{"value", "source"}` of each ceiling, "efficiency" the
    fields of `Efficiency` by software."""
    try:
        ceilings = {field: entry["value"] for field, entry in content["data_sheet"].items()}
        efficiency = {software: Efficiency(**shares) for software, shares in content["efficiency"].items()}
        return DeviceModel(name, **ceilings, efficiency=efficiency)
    except (KeyError, TypeError) as error:
        raise ConfigError(f"device {name!r}: {error}") from error


def _directory() -> Any:
    return files("slora_jax.simulation") / "devices"
