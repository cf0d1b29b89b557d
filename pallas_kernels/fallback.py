"""The choice of an op's implementation: the caller's, or the plan table's with a fallback to the XLA reference."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import jax.numpy as jnp

from pallas_kernels import devices


def choose[T](op: str, named: str | None, dtype: Any, planned: Callable[[], str], make: Callable[[str], T]) -> T:
    """Returns `make(name)` of the implementation that runs.

    Args:
      op: name in the warning.
      named: the caller's choice, which has no fallback. None: `planned()` on a GPU with a 16-bit dtype, else "xla".
      make: raises NotImplementedError where the implementation of this name does not serve the shape. If that is the
        planned one, a warning gives the reason, and "xla" runs.
    """
    if named is not None:
        return make(named)
    if devices.target() is not None and jnp.dtype(dtype).itemsize == 2:
        try:
            return make(planned())
        except NotImplementedError as reason:
            # One source line for all callers, so that Python shows each reason once.
            warnings.warn(f"{op} by the XLA reference, which is slow on a GPU: {reason}", stacklevel=1)
    return make("xla")
