"""Sampling on the device: greedy, temperature, top-k, top-p, min-p, per-request random streams, log-probabilities.

Top-k and top-p are one threshold on a row's logits (`pallas_kernels.cutoff`). Only steps that need it run the search
for it; `sample` then draws in a single pass over the logits, by the same program in either case.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels import devices
from pallas_kernels.lora.layout import ceil_div
from slora_jax.scheduling import MAX_LOGPROBS
from slora_jax.scheduling.plan import NOT_FINITE

CHUNK_ROWS = 32
"""Maximum rows per chunk, so that intermediate arrays stay in the cache: 16 MiB of float32 for a vocabulary of 128k."""


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class SamplingInputs:
    """Sampling parameters per sequence, as in `SamplingParams`.

    Attributes:
      temperature, top_p, min_p: float32 `[S]`.
      top_k: int32 `[S]`.
      seed: uint32 `[S]`.
      output_index: number of tokens that the request has sampled, including this one, int32 `[S]`.
      cutoff: infinity, or from `pallas_kernels.cutoff` for top-k and top-p, float32 `[S]`.
    """

    temperature: jax.Array
    top_k: jax.Array
    top_p: jax.Array
    min_p: jax.Array
    seed: jax.Array
    output_index: jax.Array
    cutoff: jax.Array


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Sampled:
    """New tokens of a step, with log-probabilities if requested.

    Attributes:
      token: token id or `NOT_FINITE`, int32 `[S]`.
      logprob: its log-probability, float32 `[S]`.
      top_token: most likely tokens, best first, int32 `[S, MAX_LOGPROBS]`.
      top_logprob: their log-probabilities, float32 `[S, MAX_LOGPROBS]`.
    """

    token: jax.Array
    logprob: jax.Array | None = None
    top_token: jax.Array | None = None
    top_logprob: jax.Array | None = None


def greedy(logits: jax.Array) -> jax.Array:
    """Returns the token with the largest logit of each row of `logits [S, V]`, or `NOT_FINITE`, int32 `[S]`."""
    token = jnp.argmax(logits, axis=-1)  # a NaN counts as the largest
    largest = jnp.take_along_axis(logits, token[:, None], axis=1)[:, 0]
    return jnp.where(jnp.isfinite(largest), token, NOT_FINITE).astype(jnp.int32)


def edited(
    logits: jax.Array, first: jax.Array | int, allowed: jax.Array, bias_token: jax.Array, bias: jax.Array
) -> jax.Array:
    """Returns logits with biases added, and minus infinity at tokens that are not allowed. A row that allows every
    token and has no bias is unchanged.

    Args:
      logits: float32 `[S, V]`, of the tokens `first .. first + V`.
      allowed, bias_token, bias: see `structured.LogitEdits`.
    """
    rows, size = logits.shape
    at = bias_token - first
    at = jnp.where(at < 0, size, at)  # negative indices would count from the end
    logits = logits.at[jnp.arange(rows)[:, None], at].add(bias, mode="drop")
    bits = ((allowed[:, :, None] >> jnp.arange(32)) & 1).reshape(rows, -1)
    return jnp.where(lax.dynamic_slice_in_dim(bits, first, size, axis=1) == 1, logits, -jnp.inf)


def sample(logits: jax.Array, best: jax.Array, inputs: SamplingInputs) -> jax.Array:
    """Draws one token per row of `logits` (float32 `[S, V]`), or `NOT_FINITE`. Returns int32 `[S]`.

    A row's draw depends only on its own logits, parameters, seed and output index. `best` is from `greedy`.
    """
    if devices.target() is not None:  # one pass of one kernel, without intermediate arrays
        return _draw(logits, best, inputs)
    return _in_chunks(_draw, logits, best, inputs)


def score(logits: jax.Array, token: jax.Array) -> Sampled:
    """Returns each row's `token` (int32 `[S]`) with log-probabilities from `logits` (float32 `[S, V]`)."""
    return Sampled(token, *_in_chunks(_logprobs, logits, token))


def _in_chunks(function: Callable[..., Any], *arrays: Any) -> Any:
    """Computes `function(*arrays)` in chunks of rows; rows must be independent. All chunks have the same size, so the
    last one may recompute some rows of the one before."""
    total = jax.tree.leaves(arrays)[0].shape[0]
    chunks = ceil_div(total, CHUNK_ROWS)
    if chunks <= 1:
        return function(*arrays)
    rows = ceil_div(total, chunks)

    def chunk(i: jax.Array, done: Any) -> Any:
        start = jnp.minimum(i * rows, total - rows)
        part = jax.tree.map(lambda x: lax.dynamic_slice_in_dim(x, start, rows), arrays)
        return jax.tree.map(
            lambda whole, new: lax.dynamic_update_slice_in_dim(whole, new, start, 0), done, function(*part)
        )

    empty = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), jax.eval_shape(function, *arrays))
    return lax.fori_loop(0, chunks, chunk, empty)


def _logprobs(logits: jax.Array, token: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Returns the log-probability of each row's `token`, and the most likely tokens with theirs."""
    logprobs = jax.nn.log_softmax(logits, axis=-1)
    logprobs = jnp.maximum(logprobs, jnp.finfo(logprobs.dtype).min)  # JSON has no infinity
    top_logprob, top_token = lax.top_k(logprobs, min(MAX_LOGPROBS, logits.shape[-1]))
    return jnp.take_along_axis(logprobs, token[:, None], axis=1)[:, 0], top_token.astype(jnp.int32), top_logprob


def _draw(logits: jax.Array, best: jax.Array, inputs: SamplingInputs) -> jax.Array:
    """Gumbel-max over the masked, scaled logits; greedy rows keep `best`."""
    stochastic = inputs.temperature > 0
    distance = jnp.take_along_axis(logits, jnp.maximum(best, 0)[:, None], axis=1) - logits
    scaled = -distance / jnp.where(stochastic, inputs.temperature, 1.0)[:, None]

    def noise(seed: jax.Array, index: jax.Array) -> jax.Array:
        key = jax.random.fold_in(jax.random.key(seed), index)
        return jax.random.gumbel(key, logits.shape[-1:])

    perturbed = scaled + jax.vmap(noise)(inputs.seed, inputs.output_index)
    keep = (distance <= inputs.cutoff[:, None]) & (scaled >= jnp.log(inputs.min_p)[:, None])  # p >= min_p * p_max
    drawn = jnp.argmax(jnp.where(keep, perturbed, -jnp.inf), axis=-1).astype(jnp.int32)
    return jnp.where(stochastic & (best != NOT_FINITE), drawn, best)
