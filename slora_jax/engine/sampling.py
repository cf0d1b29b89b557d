"""Sampling on the device: greedy, temperature, top-k, top-p, min-p, per-request random streams, logprobs.

Masks come from a binary search for a threshold on the logits rather than from a sort of the vocabulary. A few rows are
worked on at a time, so that what lies between the logits and a token is small: it stays in a GPU's cache.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels.lora.layout import ceil_div
from slora_jax.scheduling import MAX_LOGPROBS
from slora_jax.scheduling.plan import NOT_FINITE

CHUNK_ROWS = 32
"""Most rows that are worked on at a time: 16 MiB of float32 for a vocabulary of 128k."""


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class SamplingInputs:
    """Per sequence `[S]`, as in `SamplingParams`. seed uint32; output_index: how many tokens the request has sampled,
    this one included."""

    temperature: jax.Array
    top_k: jax.Array
    top_p: jax.Array
    min_p: jax.Array
    seed: jax.Array
    output_index: jax.Array


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Sampled:
    """token int32 `[S]`, or `NOT_FINITE`. If logprobs are asked for: logprob float32 `[S]` of it; top_token int32,
    top_logprob float32 `[S, MAX_LOGPROBS]`, best first."""

    token: jax.Array
    logprob: jax.Array | None = None
    top_token: jax.Array | None = None
    top_logprob: jax.Array | None = None


def greedy(logits: jax.Array) -> jax.Array:
    """Returns the token of the largest logit of each row of `logits` `[S, V]`, or `NOT_FINITE`: int32 `[S]`."""
    token = jnp.argmax(logits, axis=-1)  # of a NaN, if there is one
    largest = jnp.take_along_axis(logits, token[:, None], axis=1)[:, 0]
    return jnp.where(jnp.isfinite(largest), token, NOT_FINITE).astype(jnp.int32)


def sample(logits: jax.Array, inputs: SamplingInputs) -> jax.Array:
    """Draws one token per row of `logits` float32 `[S, V]`, or `NOT_FINITE`: int32 `[S]`.

    A row's draw depends on its own logits, parameters, seed and output index only.
    """
    return _in_chunks(_draw, logits, inputs)


def score(logits: jax.Array, token: jax.Array) -> Sampled:
    """Each row's `token` int32 `[S]`, with log-probabilities from `logits` float32 `[S, V]`."""
    return Sampled(token, *_in_chunks(_logprobs, logits, token))


def _in_chunks(function: Callable[..., Any], *arrays: Any) -> Any:
    """`function(*arrays)`, a few rows of all arrays at a time; row by row it must depend on nothing else. All chunks
    are of one size, so the last may do some rows of the one before again."""
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

    nothing = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), jax.eval_shape(function, *arrays))
    return lax.fori_loop(0, chunks, chunk, nothing)


def _logprobs(logits: jax.Array, token: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Log-probability of each row's `token`, and the likeliest tokens with theirs."""
    logprobs = jax.nn.log_softmax(logits, axis=-1)
    logprobs = jnp.maximum(logprobs, jnp.finfo(logprobs.dtype).min)  # JSON has no infinity
    top_logprob, top_token = lax.top_k(logprobs, min(MAX_LOGPROBS, logits.shape[-1]))
    return jnp.take_along_axis(logprobs, token[:, None], axis=1)[:, 0], top_token.astype(jnp.int32), top_logprob


def _draw(logits: jax.Array, inputs: SamplingInputs) -> jax.Array:
    """Gumbel-max over the masked, scaled logits; greedy rows keep their argmax."""
    stochastic = inputs.temperature > 0
    likeliest = greedy(logits)
    scaled = logits - logits.max(axis=-1, keepdims=True)  # before the division, which may overflow
    scaled = scaled / jnp.where(stochastic, inputs.temperature, 1.0)[:, None]
    keep = _masks(scaled, inputs)

    def noise(seed: jax.Array, index: jax.Array) -> jax.Array:
        key = jax.random.fold_in(jax.random.key(seed), index)
        return jax.random.gumbel(key, logits.shape[-1:])

    perturbed = jnp.where(keep, scaled + jax.vmap(noise)(inputs.seed, inputs.output_index), -jnp.inf)
    drawn = jnp.argmax(perturbed, axis=-1).astype(jnp.int32)
    return jnp.where(stochastic & (likeliest != NOT_FINITE), drawn, likeliest)


def _masks(scaled: jax.Array, inputs: SamplingInputs) -> jax.Array:
    """Tokens that top-k, then top-p, then min-p leave: bool `[S, V]`. `scaled` has its row maximum at 0."""
    top_k = jnp.where(inputs.top_k > 0, inputs.top_k, scaled.shape[-1])
    floor = _highest_threshold(scaled, lambda kept: kept.sum(-1) >= jnp.minimum(top_k, scaled.shape[-1]))
    keep = scaled >= floor[:, None]
    p = jnp.where(keep, jnp.exp(scaled), 0.0)
    p = p / p.sum(-1, keepdims=True)
    floor = _highest_threshold(scaled, lambda kept: jnp.where(kept & keep, p, 0.0).sum(-1) >= inputs.top_p)
    keep &= (scaled >= floor[:, None]) | (inputs.top_p >= 1.0)[:, None]
    return keep & (scaled >= jnp.log(inputs.min_p)[:, None])  # p >= min_p * p_max


def _highest_threshold(x: jax.Array, enough: Callable[[jax.Array], jax.Array]) -> jax.Array:
    """The highest value t `[S]` for which `enough(x >= t)` holds (it must be monotone), exact to the last bit: a binary
    search over float32 bit patterns, which for values of at most 0 fall in order of magnitude. Ties are kept."""
    bits = lax.bitcast_convert_type(jnp.abs(jnp.minimum(x, 0.0)), jnp.uint32)  # monotone in -x
    low = jnp.zeros(x.shape[0], jnp.uint32)
    high = jnp.full(x.shape[0], 0x7F800000, jnp.uint32)  # infinity: everything is kept

    def halve(_: jax.Array, bounds: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        low, high = bounds
        middle = low + (high - low) // 2
        ok = enough(bits <= middle[:, None])
        return jnp.where(ok, low, middle + 1), jnp.where(ok, middle, high)

    _, high = lax.fori_loop(0, 31, halve, (low, high))
    return -lax.bitcast_convert_type(high, jnp.float32)
