"""Mosaic GPU kernels of a compiled program. The program has them as MLIR; each is compiled again, alone, with the
compiler's reports enabled."""

from __future__ import annotations

import ctypes
import os
import re
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import jax
import jax.numpy as jnp
from jax._src.interpreters.mlir import make_ir_context
from jax._src.lib import mosaic_gpu_dialect
from jaxlib.mlir import ir

from pallas_kernels.targets import Target, compile_for

_REPORTS = ("MOSAIC_GPU_DUMP_PTX", "MOSAIC_GPU_DUMP_PTXAS")
_SHARED_MEMORY = 10
"""Index of the dynamic shared memory among the operand groups of `gpu.launch`."""


def parse(module: bytes) -> tuple[str, int]:
    """Returns a kernel's code without source locations, which identifies it, and its dynamic shared memory in bytes."""
    context = make_ir_context()
    context.allow_unregistered_dialects = True
    mosaic_gpu_dialect.register_dialect(context)
    with context:
        operation = ir.Module.parse(module, context).operation
        text = str(operation.get_asm(enable_debug_info=False))
        code = re.sub(r'mosaic_gpu\.dump_basename = "[^"]*"', "", text)
        (launch,) = [op for op in _operations(operation) if op.name.endswith("gpu.launch")]
        groups = list(launch.attributes["operandSegmentSizes"])
        shared = 0
        if groups[_SHARED_MEMORY]:
            size = launch.operands[sum(groups[:_SHARED_MEMORY])]
            shared = ir.IntegerAttr(size.owner.attributes["value"]).value
        return code, shared


def recompile(module: bytes, target: Target) -> tuple[str, str]:
    """Compiles a kernel for `target`. Returns its PTX and the report of `ptxas -v`."""

    def call(x: jax.Array) -> jax.Array:
        return jax.ffi.ffi_call("mosaic_gpu_v2", x)(
            x,
            kernel_hash=os.urandom(16).hex(),  # a known hash would be read from the cache without a report
            module=module,
            use_custom_barrier=False,
            skip_device_barrier=False,
            uses_xla_collective_metadata=False,
        )

    with tempfile.TemporaryFile() as file:
        with _stdout_to(file.fileno()), _environment(dict.fromkeys(_REPORTS, "1")):
            compile_for(target, jax.jit(call), jax.ShapeDtypeStruct((), jnp.float32))
        file.seek(0)
        said = file.read().decode("utf-8", errors="replace")
    ptx, begin, report = said.partition("ptxas info")
    return ptx, begin + report


def _operations(operation: Any) -> Iterator[Any]:
    for region in operation.regions:
        for block in region.blocks:
            for op in block.operations:
                yield op.operation
                yield from _operations(op.operation)


@contextmanager
def _stdout_to(descriptor: int) -> Iterator[None]:
    """Redirects file descriptor 1, which the C++ compiler prints to."""
    libc = ctypes.CDLL(None)
    sys.stdout.flush()
    libc.fflush(None)
    kept = os.dup(1)
    os.dup2(descriptor, 1)
    try:
        yield
    finally:
        libc.fflush(None)
        os.dup2(kept, 1)
        os.close(kept)


@contextmanager
def _environment(variables: dict[str, str]) -> Iterator[None]:
    before = {name: os.environ.get(name) for name in variables}
    os.environ.update(variables)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value
