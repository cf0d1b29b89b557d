"""Triton's interpreter behind a JAX callback. The process that runs it: `python -m pallas_kernels.triton_interpreter`.

Triton chooses between compiling and interpreting at import, by `TRITON_INTERPRET`; a separate process lets one program
compile kernels for a GPU and run them on the CPU. Outputs without an aliased argument are filled with NaN (integers:
with a large negative number), which exposes a kernel that leaves one unwritten.
"""

from __future__ import annotations

import atexit
import importlib
import os
import pickle
import subprocess
import sys
import threading
from collections.abc import Mapping, Sequence
from types import SimpleNamespace
from typing import Any

import jax
import ml_dtypes
import numpy as np

POISON = -(2**30)
"""Value of integer outputs before the kernel runs."""


def call(
    kernel: str,
    args: Sequence[jax.Array],
    out: Sequence[jax.ShapeDtypeStruct],
    grid: tuple[int, ...],
    aliases: Mapping[int, int],
    constants: Mapping[str, Any],
) -> tuple[jax.Array, ...]:
    """Runs `triton_call` by the interpreter.

    Raises:
      RuntimeError: the kernel raised an exception, or its process died.
    """

    def run(*arrays: Any) -> tuple[np.ndarray, ...]:
        inputs = [np.asarray(array) for array in arrays]
        outputs = []
        for i, struct in enumerate(out):
            source = next((inputs[a] for a, o in aliases.items() if o == i), None)
            outputs.append(_poisoned(struct) if source is None else np.array(source))
        return _interpreter.run(kernel, inputs, outputs, dict(aliases), grid, dict(constants))

    structs = tuple(jax.ShapeDtypeStruct(s.shape, s.dtype) for s in out)
    return tuple(jax.pure_callback(run, structs, *args))


def _poisoned(struct: jax.ShapeDtypeStruct) -> np.ndarray:
    floating = struct.dtype.kind == "f" or struct.dtype == ml_dtypes.bfloat16
    return np.full(struct.shape, np.nan if floating else POISON, struct.dtype)


class _Interpreter:
    """Owns the interpreting process, which starts at the first call and ends with the parent."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._process: subprocess.Popen | None = None

    def run(self, *request: Any) -> tuple[np.ndarray, ...]:
        with self._lock:
            if self._process is None or self._process.poll() is not None:
                self._process = subprocess.Popen(
                    [sys.executable, "-m", "pallas_kernels.triton_interpreter"],
                    env=os.environ | {"TRITON_INTERPRET": "1", "JAX_PLATFORMS": "cpu", "OMP_NUM_THREADS": "1"},
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                )
                atexit.register(self._process.kill)
            assert self._process.stdin is not None and self._process.stdout is not None
            try:
                pickle.dump(request, self._process.stdin)
                self._process.stdin.flush()
                outputs, error = pickle.load(self._process.stdout)
            except (EOFError, BrokenPipeError) as e:
                raise RuntimeError(f"the process that interprets Triton kernels died while it ran {request[0]}") from e
        if error is not None:
            raise RuntimeError(f"{request[0]} under Triton's interpreter:\n{error}")
        return outputs


_interpreter = _Interpreter()


def _repair_interpreter() -> None:
    """Repairs Triton 3.6's interpreter: it converts a scalar, stored as an array `[1]`, to int in a way that NumPy 2.5
    refuses; and it casts bfloat16, stored as bits, without rounding and multiplies it as integers. These casts also
    cover fp8. It patches Triton's whole language at every call of a device function, which took half of a kernel's
    time; here a launch patches it once."""
    import triton.language as tl
    from triton.runtime import interpreter

    builder, handle = interpreter.InterpreterBuilder, interpreter.TensorHandle
    as_bits = {tl.bfloat16: ml_dtypes.bfloat16, tl.float8e4nv: ml_dtypes.float8_e4m3fn}
    patch_tensor, cast, dot = interpreter._patch_lang_tensor, builder.cast_impl, builder.create_dot
    patch_modules, modules = interpreter._patch_lang, SimpleNamespace(__globals__={"tl": tl, "core": tl.core})

    def patch_tensor_and_index(tensor: Any, scope: Any) -> None:
        patch_tensor(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda scalar: int(scalar.handle.data.item()))

    def widen(source: Any) -> Any:
        kind = as_bits.get(source.dtype.scalar)
        return source if kind is None else handle(source.data.view(kind).astype(np.float32), tl.float32)

    def cast_with_rounding(self: Any, source: Any, target: Any, *rounding: Any) -> Any:
        source = widen(source)
        if target.scalar == tl.bfloat16:
            return handle(source.data.astype(ml_dtypes.bfloat16).view(np.uint16), tl.bfloat16)
        return source if target.scalar == source.dtype.scalar else cast(self, source, target)

    def dot_of_values(self: Any, a: Any, b: Any, *rest: Any) -> Any:
        return dot(self, widen(a), widen(b), *rest)

    interpreter._patch_lang_tensor = patch_tensor_and_index
    interpreter._patch_lang = lambda _: patch_modules(modules)
    interpreter.InterpretedFunction.__call__ = lambda self, *args, **kwargs: self.rewrite()(*args, **kwargs)
    builder.cast_impl = cast_with_rounding
    builder.create_fp_to_fp = cast_with_rounding
    builder.create_dot = dot_of_values


def _serve() -> None:
    """Answers requests on standard input until it closes."""
    import traceback

    _repair_interpreter()

    requests, answers = sys.stdin.buffer, os.fdopen(os.dup(sys.stdout.fileno()), "wb")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())  # keeps a kernel's prints out of the answers
    while True:
        try:
            request = pickle.load(requests)
        except EOFError:
            return
        try:
            answer: tuple[Any, str | None] = (_interpret(*request), None)
        except Exception:  # noqa: BLE001 - reported to the caller
            answer = (None, traceback.format_exc())
        pickle.dump(answer, answers)
        answers.flush()


def _interpret(
    kernel: str,
    inputs: list[np.ndarray],
    outputs: list[np.ndarray],
    aliases: dict[int, int],
    grid: tuple[int, ...],
    constants: dict[str, Any],
) -> tuple[np.ndarray, ...]:
    import torch

    def tensor(array: np.ndarray) -> torch.Tensor:
        array = np.array(array, order="C")
        if array.dtype == ml_dtypes.bfloat16:
            return torch.from_numpy(array.view(np.int16)).view(torch.bfloat16)
        if array.dtype == ml_dtypes.float8_e4m3fn:
            return torch.from_numpy(array.view(np.uint8)).view(torch.float8_e4m3fn)
        return torch.from_numpy(array)

    out_tensors = [tensor(array) for array in outputs]
    in_tensors = [out_tensors[aliases[i]] if i in aliases else tensor(array) for i, array in enumerate(inputs)]
    module, function = kernel.split(":")
    getattr(importlib.import_module(module), function)[grid](*in_tensors, *out_tensors, **constants)
    return tuple(
        t.view(torch.int16).numpy().view(ml_dtypes.bfloat16) if t.dtype == torch.bfloat16 else t.numpy()
        for t in out_tensors
    )


if __name__ == "__main__":
    _serve()
