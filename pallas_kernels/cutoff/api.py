"""The threshold of top-k and top-p sampling, by search instead of sorting: Triton on a GPU, XLA elsewhere."""

from __future__ import annotations

from typing import Literal

import jax
import jax.numpy as jnp

from pallas_kernels import devices
from pallas_kernels.cutoff import xla


def cutoff(
    logits: jax.Array,
    best: jax.Array,
    temperature: jax.Array,
    top_k: jax.Array,
    top_p: jax.Array,
    *,
    implementation: Literal["triton", "xla"] | None = None,
    interpret: bool = False,
) -> jax.Array:
    """Returns how far below a row's largest logit top-k, and then top-p, keep tokens. Ties are kept.

    Args:
      logits: float32 `[S, V]`.
      best: token with the largest logit of each row, int32 `[S]`. Rows without one (-1) have any result.
      temperature: divides the logits for top-p, float32 `[S]`; 0 is greedy.
      top_k: int32 `[S]`; 0 keeps all.
      top_p: share of the probability left by top-k, float32 `[S]`; 1 keeps all.
      implementation: None is Triton on a GPU, else XLA.
      interpret: run the Triton kernel in its interpreter.

    Returns:
      float32 `[S]`: tokens with `logits[best] - logit <= cutoff` are kept. It is such a difference, or infinity.
    """
    if implementation is None:
        implementation = "xla" if devices.target() is None else "triton"
    best = jnp.maximum(best, 0)
    if implementation == "xla":
        return xla.cutoff(logits, best, temperature, top_k, top_p)
    from pallas_kernels.cutoff import triton  # not installed everywhere

    return triton.cutoff(logits, best, temperature, top_k, top_p, interpret=interpret)
