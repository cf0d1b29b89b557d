"""The engine's weights, as adapters need them when they are loaded (`adapters.vectors.BaseWeights`)."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from slora_jax.adapters import BaseGeometry
from slora_jax.models import Params
from slora_jax.models.quantised import dequantised


class EngineWeights:
    """Reads the parameters on the device, between steps.

    The layers' weights stay there; only norms and biases are copied to the host.
    """

    def __init__(self, params: Callable[[], Params], geometry: BaseGeometry, max_rank: int, *, norms: bool) -> None:
        """Compiles the norms of every projection, if `norms` are needed.

        Args:
          params: returns the present parameters, sharded as `geometry` says.
          max_rank: largest rank of an adapter, to which A and B are padded, so that no later call compiles anything.
        """
        self._params, self._geometry, self._max_rank = params, geometry, max_rank
        self._columns: dict[str, tuple[str, int]] = {}  # stack, and the first column in a shard's kernel
        for stack in geometry.layout.stacks:
            for projection, first in zip(stack.projections, stack.columns, strict=True):
                self._columns[projection] = stack.name, first
                if norms and stack.name in params()["layers"][0]:  # layers with experts lack some
                    d_in, d_out = geometry.dims(projection)
                    self.row_norms(0, projection, np.zeros((1, d_in), np.float32), np.zeros((d_out, 1), np.float32))

    def row_norms(self, layer: int, projection: str, a: np.ndarray, b: np.ndarray) -> np.ndarray:
        """Returns the norm of each row of `W + b a`, see `BaseWeights`."""
        stack, first = self._columns[projection]
        padding = (0, self._max_rank - a.shape[0])
        a, b = np.pad(a, (padding, (0, 0))), np.pad(b, ((0, 0), padding))
        linear, parts = self._params()["layers"][layer][stack], self._parts(projection)
        b = np.concatenate([b[part] for part in parts])
        norms = _row_norms(linear["kernel"], linear.get("scale"), a, b, first, len(parts))
        return self._whole(projection, np.asarray(norms))

    def _parts(self, projection: str) -> list[slice]:
        return self._geometry.shards.base_outputs(projection, self._geometry.dims(projection)[1])

    def _whole(self, projection: str, values: np.ndarray) -> np.ndarray:
        """Puts the shards' values, one after the other, into the order of the projection's outputs `[d_out]`."""
        parts = self._parts(projection)
        whole = np.empty(self._geometry.dims(projection)[1], np.float32)
        for part, own in zip(parts, np.split(values, len(parts)), strict=True):
            whole[part] = own
        return whole

    @property
    def is_tied(self) -> bool:
        """True if the head is the embedding."""
        return "lm_head" not in self._params()

    def rows(self, end: str) -> np.ndarray:
        """Copies the matrix of "embed" or "head" to the host, `[vocab, d]`."""
        params = self._params()
        is_embedding = end == "embed" or self.is_tied
        rows = np.asarray(params["embed"]["embedding"]) if is_embedding else np.asarray(params["lm_head"]["kernel"]).T
        return rows[: self._geometry.vocab_size]

    def bias(self, layer: int, projection: str) -> np.ndarray | None:
        """Returns the projection's bias, see `BaseWeights`."""
        stack, first = self._columns[projection]
        bias = self._params()["layers"][layer][stack].get("bias")
        if bias is None:
            return None
        parts = self._parts(projection)
        by_shard = np.asarray(bias, np.float32).reshape(len(parts), -1)
        return self._whole(projection, by_shard[:, first : first + parts[0].stop - parts[0].start].reshape(-1))


@partial(jax.jit, static_argnames=("first", "parts"))
def _row_norms(
    kernel: jax.Array, scale: jax.Array | None, a: jax.Array, b: jax.Array, first: int, parts: int
) -> jax.Array:
    """The norm of each row of `W + b a`, float32 `[d_out]`. W is the transpose of columns of `kernel`: of each of its
    equal `parts`, those from `first` on.

    Expanded to `|w|^2 + 2 w (b a)^T + |b a|^2`, it needs no copy of a weight in the model's dtype.
    """
    exact = jax.lax.Precision.HIGHEST
    width = b.shape[0] // parts

    def own(whole: jax.Array) -> jax.Array:
        by_part = whole.reshape(whole.shape[0], parts, -1)[:, :, first : first + width]
        return by_part.reshape(whole.shape[0], -1)

    w = own(kernel)  # [d_in, d_out]
    if scale is not None:
        w = dequantised(w, own(scale), jnp.dtype(jnp.float32))
    squares = jnp.sum(jnp.square(w.astype(jnp.float32)), axis=0)  # [d_out]
    crossed = jnp.dot(a.astype(w.dtype), w, precision=exact, preferred_element_type=jnp.float32)  # [r, d_out]
    gram = jnp.dot(a, a.T, precision=exact)  # [r, r]
    update = jnp.sum(jnp.dot(b, gram, precision=exact) * b, axis=1)
    return jnp.sqrt(squares + 2 * jnp.sum(crossed * b.T, axis=0) + update)
