"""The engine's weights, as adapters need them when they are loaded (`adapters.vectors.BaseWeights`)."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.lora.layout import LoraLayout
from slora_jax.models import Params
from slora_jax.models.quantised import dequantised


class EngineWeights:
    """Reads the parameters on the device, between steps.

    The layers' weights stay there; only norms and biases are copied to the host.
    """

    def __init__(self, params: Callable[[], Params], layout: LoraLayout, max_rank: int, *, norms: bool) -> None:
        """Compiles the norms of every projection, if `norms` are needed.

        Args:
          params: returns the present parameters.
          layout: of the whole model.
          max_rank: largest rank of an adapter, to which A and B are padded, so that no later call compiles anything.
        """
        self._params, self._max_rank = params, max_rank
        self._columns: dict[str, tuple[str, int, int]] = {}
        for stack in layout.stacks:
            for projection, first, d_out in zip(stack.projections, stack.columns, stack.d_outs, strict=True):
                self._columns[projection] = stack.name, first, d_out
                if norms and stack.name in params()["layers"][0]:  # layers with experts lack some
                    self.row_norms(
                        0, projection, np.zeros((1, stack.d_in), np.float32), np.zeros((d_out, 1), np.float32)
                    )

    def row_norms(self, layer: int, projection: str, a: np.ndarray, b: np.ndarray) -> np.ndarray:
        """Returns the norm of each row of `W + b a`, see `BaseWeights`."""
        stack, first, _ = self._columns[projection]
        padding = (0, self._max_rank - a.shape[0])
        a, b = np.pad(a, (padding, (0, 0))), np.pad(b, ((0, 0), padding))
        linear = self._params()["layers"][layer][stack]
        return np.asarray(_row_norms(linear["kernel"], linear.get("scale"), a, b, first))

    @property
    def is_tied(self) -> bool:
        """True if the head is the embedding."""
        return "lm_head" not in self._params()

    def rows(self, end: str) -> np.ndarray:
        """Copies the matrix of "embed" or "head" to the host, `[vocab, d]`."""
        params = self._params()
        if end == "embed" or self.is_tied:
            return np.asarray(params["embed"]["embedding"])
        return np.asarray(params["lm_head"]["kernel"]).T

    def bias(self, layer: int, projection: str) -> np.ndarray | None:
        """Returns the projection's bias, see `BaseWeights`."""
        stack, first, d_out = self._columns[projection]
        bias = self._params()["layers"][layer][stack].get("bias")
        return None if bias is None else np.asarray(bias, np.float32)[first : first + d_out]


@partial(jax.jit, static_argnames="first")
def _row_norms(kernel: jax.Array, scale: jax.Array | None, a: jax.Array, b: jax.Array, first: int) -> jax.Array:
    """The norm of each row of `W + b a`, float32 `[d_out]`; W is the transpose of columns `first` on of `kernel`.

    Expanded to `|w|^2 + 2 w (b a)^T + |b a|^2`, it needs no copy of a weight in the model's dtype.
    """
    exact = jax.lax.Precision.HIGHEST
    own = partial(jax.lax.slice_in_dim, start_index=first, limit_index=first + b.shape[0], axis=1)
    w = own(kernel)  # [d_in, d_out]
    if scale is not None:
        w = dequantised(w, own(scale), jnp.dtype(jnp.float32))
    squares = jnp.sum(jnp.square(w.astype(jnp.float32)), axis=0)  # [d_out]
    crossed = jnp.dot(a.astype(w.dtype), w, precision=exact, preferred_element_type=jnp.float32)  # [r, d_out]
    gram = jnp.dot(a, a.T, precision=exact)  # [r, r]
    update = jnp.sum(jnp.dot(b, gram, precision=exact) * b, axis=1)
    return jnp.sqrt(squares + 2 * jnp.sum(crossed * b.T, axis=0) + update)
