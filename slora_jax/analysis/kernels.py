"""The custom GPU kernels of a compiled program, without XLA's own fusions."""

from __future__ import annotations

import re
import zlib
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import jax

from pallas_kernels.devices import Device
from pallas_kernels.targets import TARGETS
from slora_jax.analysis.hlo import Instruction, instructions
from slora_jax.analysis.ptxas import assemble, read_report

_TARGET = re.compile(r'custom_call_target="([^"]*)"')
_TRITON_CALL = re.compile(r'\bopaque = "((?:[^"\\]|\\.)*)"')
_MOSAIC_MODULE = re.compile(r'\bmodule = "((?:[^"\\]|\\.)*)"')
_MLIR_ESCAPE = re.compile(rb"\\(?:([0-9A-Fa-f]{2})|(.))", re.DOTALL)


@dataclass(frozen=True)
class KernelUse:
    """A compiled kernel. Each variant of a function (other constants, other block shapes) has its own entry.

    Attributes:
      name: the function's.
      backend: "triton" or "mosaic_gpu".
      registers: per thread.
      spill_bytes: spill stores and loads per thread.
      shared_bytes: static and dynamic shared memory per block.
      count: launches per run of the program.
      ptx: the assembly.
      blocks, warps: blocks of a launch, and warps of a block; 0 for Mosaic GPU kernels.
    """

    name: str
    backend: str
    registers: int
    spill_bytes: int
    shared_bytes: int
    count: int
    ptx: str = field(repr=False)
    blocks: int = 0
    warps: int = 0


def kernels_in(program: Any, device: Device) -> list[KernelUse]:
    """Returns the custom kernels of a program compiled or lowered for `device`, by name. Kernels in branches count as
    launched; the body of a loop with an unknown trip count (of any loop, if only lowered) counts once.

    Raises:
      ConfigError: `ptxas`, which reports registers and spills, is missing.
    """
    found = Counter[KernelUse]()
    text = program.as_text("hlo") if isinstance(program, jax.stages.Lowered) else program.as_text()
    for instruction in instructions(text):
        if instruction.opcode == "custom-call":
            for kernel in _kernels_of(instruction, device):
                found[kernel] += instruction.times
    uses = [KernelUse(**{**vars(kernel), "count": count}) for kernel, count in found.items()]
    return sorted(uses, key=lambda use: (use.name, use.shared_bytes, use.registers, use.ptx))


def _kernels_of(instruction: Instruction, device: Device) -> Iterator[KernelUse]:
    target = _TARGET.search(instruction.rest)
    if target is None:
        return
    if target[1] == "triton_kernel_call_ffi":
        call = _TRITON_CALL.search(instruction.rest)
        assert call is not None
        yield _triton_kernel(call[1])
    elif target[1] == "mosaic_gpu_v2":
        module = _MOSAIC_MODULE.search(instruction.rest)
        assert module is not None
        yield _mosaic_kernel(module[1], device.name)


def _unescape(text: str) -> bytes:
    """Decodes bytes that MLIR wrote as a string."""
    return _MLIR_ESCAPE.sub(lambda m: bytes.fromhex(m[1].decode()) if m[1] else m[2], text.encode("latin-1"))


@cache
def _triton_kernel(opaque: str) -> KernelUse:
    """`opaque` is jax-triton's TritonAnyKernelCall, compressed and escaped."""
    call = _fields(zlib.decompress(_unescape(opaque)))
    if 1 not in call:
        raise NotImplementedError("a Triton kernel that is tuned at run time: there is no one kernel to report on")
    launch = _fields(call[1])  # TritonKernelCall: 1 kernel, 2 to 4 grid
    kernel = _fields(launch[1])  # TritonKernel: 1 name, 2 warps, 3 dynamic shared memory, 4 PTX
    ptx = kernel[4].decode()
    used = assemble(ptx)
    shared = used.shared_bytes + kernel.get(3, 0)
    blocks = launch[2] * launch[3] * launch[4]
    return KernelUse(kernel[1].decode(), "triton", used.registers, used.spill_bytes, shared, 0, ptx, blocks, kernel[2])


@cache
def _mosaic_kernel(module: str, device: str) -> KernelUse:
    """`module` is MLIR bytecode, escaped as MLIR does."""
    from slora_jax.analysis import mosaic  # imports JAX's internals, which only Mosaic kernels need

    raw = _unescape(module)
    code, dynamic_shared = mosaic.parse(raw)
    if (code, device) not in _mosaic_seen:
        _mosaic_seen[code, device] = mosaic.recompile(raw, TARGETS[device])
    ptx, report = _mosaic_seen[code, device]
    used = read_report(report)
    entry = re.search(r"\.entry (\w+)", ptx)
    name = entry[1].removesuffix("_mosaic_gpu_kernel") if entry else "unknown"
    shared = used.shared_bytes + dynamic_shared
    return KernelUse(name, "mosaic_gpu", used.registers, used.spill_bytes, shared, 0, ptx)


_mosaic_seen: dict[tuple[str, str], tuple[str, str]] = {}


def _fields(message: bytes) -> dict[int, Any]:
    """Returns the fields of a protocol buffer by number, as ints and bytes; a repeated field has its last value."""
    fields: dict[int, Any] = {}
    at = 0

    def varint() -> int:
        nonlocal at
        value = shift = 0
        while True:
            byte = message[at]
            at += 1
            value |= (byte & 127) << shift
            shift += 7
            if byte < 128:
                return value

    while at < len(message):
        number, kind = divmod(varint(), 8)
        if kind == 0:
            fields[number] = varint()
        elif kind in (1, 5):
            at += 8 if kind == 1 else 4
        elif kind == 2:
            size = varint()
            fields[number] = message[at : at + size]
            at += size
        else:
            raise ValueError(f"wire type {kind} in a protocol buffer")
    return fields
