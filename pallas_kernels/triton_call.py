"""Calls a Triton kernel from JAX: compiled into the program by jax-triton, or run by Triton's interpreter on the CPU.

Triton decides at import whether it compiles or interprets. So a separate process interprets; it imports the kernel by
its module and name (see `triton_interpreter`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cache
from typing import Any

import jax
import numpy as np

from pallas_kernels import devices, triton_interpreter


def triton_call(
    kernel: Any,
    *args: jax.Array,
    out: Sequence[jax.ShapeDtypeStruct],
    grid: tuple[int, ...],
    num_warps: int,
    num_stages: int,
    aliases: Mapping[int, int] | None = None,
    interpret: bool = False,
    **constants: Any,
) -> tuple[jax.Array, ...]:
    """Runs `kernel(*args, *out, **constants)` over `grid`.

    Args:
      kernel: a `triton.jit` function of a module.
      out: shapes and dtypes of the outputs, which are uninitialised unless aliased.
      aliases: argument -> output: the output takes over the argument's buffer.
      interpret: run by Triton's interpreter, in a separate process, on the CPU.
      constants: the kernel's `tl.constexpr` arguments.
    """
    aliases = dict(aliases or {})
    if interpret:
        name = f"{kernel.__module__}:{kernel.__name__}"
        return triton_interpreter.call(name, args, out, grid, aliases, constants)
    import jax_triton

    _call_through_ffi()
    device = devices.target()
    return tuple(
        jax_triton.triton_call(
            *args,
            kernel=kernel,
            out_shape=list(out),
            grid=grid,
            name=kernel.__name__,
            num_warps=num_warps,
            num_stages=num_stages,
            input_output_aliases=aliases,
            compute_capability=device.compute_capability if device and devices.is_absent() else None,
            **{name: _plain(value) for name, value in constants.items()},
        )
    )


@cache
def _call_through_ffi() -> None:
    """Routes jax-triton's calls to jaxlib's FFI handler. jax-triton 0.3 uses the older entry point, which XLA does not
    put into command buffers (CUDA graphs): every kernel would split the step."""
    from jax.interpreters import mlir
    from jax_triton import triton_lib
    from jaxlib.mlir import ir

    def lower(context: Any, *args: Any, **params: Any) -> Any:
        results = triton_lib.triton_kernel_call_lowering(triton_lib.get_cuda_backend, context, *args, **params)
        value = results[0]
        attributes = (value[0] if isinstance(value, Sequence) else value).owner.attributes
        attributes["call_target_name"] = ir.StringAttr.get("triton_kernel_call_ffi")
        attributes["api_version"] = ir.IntegerAttr.get(ir.IntegerType.get_signless(32), 4)
        attributes["backend_config"] = ir.DictAttr.get({"opaque": attributes["backend_config"]})
        return results

    mlir.register_lowering(triton_lib.triton_kernel_call_p, lower, platform="cuda")


def _plain(value: Any) -> Any:
    """Converts NumPy scalars, which Triton does not accept as constants."""
    return value.item() if isinstance(value, np.generic) else value
