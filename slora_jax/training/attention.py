"""Causal attention over packed rows, with a backward pass that computes the shares again from their log-sum.

Rows and key-value heads are processed one after another, and queries in blocks that leave out the keys after them, so
that on a CPU the scores of a block stay in the cache. On a GPU, cuDNN's fused attention takes its place, except for
models with a `score_cap`.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from pallas_kernels import devices
from pallas_kernels.lora.layout import ceil_div

QUERY_ROWS = 128
"""Least queries of a block; a row has at most four blocks."""

SAVED = "attention"
"""Name of the results that the backward pass needs, for `jax.checkpoint_policies`."""


def packed_attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    segments: jax.Array,
    window: int | None = None,
    score_cap: float | None = None,
) -> jax.Array:
    """Attention within each sequence of each row, scaled by `head_dim ** -0.5`.

    Args:
      q: `[rows, length, H, hd]`.
      k, v: `[rows, length, Hkv, hd]`.
      segments: int32 `[rows, length]`; a query attends to keys of its own segment, up to its own position.
      window: keys that a query attends to, its own included; None: no limit.
      score_cap: a scaled score s becomes `score_cap * tanh(s / score_cap)`; None: it stays s.

    Returns:
      `[rows, length, H, hd]` in q's dtype.
    """
    is_gpu = devices.target() is not None or jax.default_backend() != "cpu"
    if is_gpu and score_cap is None:  # the fused attention cannot limit scores
        position = jnp.arange(q.shape[1])
        mask = _mask(segments, segments, position[:, None], position, window)
        fused: Literal["cudnn", "xla"] = "cudnn" if jnp.dtype(q.dtype).itemsize == 2 else "xla"
        with jax.default_matmul_precision(None if fused == "cudnn" else "highest"):
            return jax.nn.dot_product_attention(q, k, v, mask=mask[:, None], implementation=fused)
    rows, length, heads, width = q.shape
    kv_heads = k.shape[2]
    q = (
        q.reshape(rows, length, kv_heads, -1, width)
        .transpose(0, 2, 3, 1, 4)
        .reshape(rows * kv_heads, -1, length, width)
    )
    k, v = (part.swapaxes(1, 2).reshape(rows * kv_heads, length, width) for part in (k, v))
    mixed = _attention(Limits(window, score_cap), q, k, v, jnp.repeat(segments, kv_heads, 0))
    return mixed.reshape(rows, heads, length, width).swapaxes(1, 2)


@dataclass(frozen=True)
class Limits:
    """The `window` and `score_cap` of `packed_attention`."""

    window: int | None
    score_cap: float | None


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attention(limits: Limits, q: jax.Array, k: jax.Array, v: jax.Array, segments: jax.Array) -> jax.Array:
    """q `[N, G, length, hd]`, k and v `[N, length, hd]`, segments `[N, length]`; returns `[N, G, length, hd]`."""
    return _forward(limits, q, k, v, segments)[0]


def _forward(limits: Limits, *args: jax.Array) -> tuple[jax.Array, Any]:
    def one(item: tuple[jax.Array, ...]) -> tuple[jax.Array, jax.Array]:
        q, k, v, segments = item
        parts = []
        for begin, end in _blocks(q.shape[1]):
            scores = _scores(limits, q, k, segments, begin, end)  # [G * queries, keys]
            largest = scores.max(1, keepdims=True)
            shares = jnp.exp(scores - largest)
            total = shares.sum(1, keepdims=True)
            mixed = _dot(shares.astype(v.dtype), v[:end]) / total
            parts.append((_by_head(mixed, q.shape[0]), _by_head(largest + jnp.log(total), q.shape[0])))
        mixed, log_sum = (jnp.concatenate(part, 1) for part in zip(*parts, strict=True))
        return mixed.astype(q.dtype), log_sum[..., 0]

    mixed, log_sum = (checkpoint_name(part, SAVED) for part in jax.lax.map(one, args))
    return mixed, (*args, mixed, log_sum)


def _backward(limits: Limits, saved: Any, slope: jax.Array) -> tuple[Any, ...]:
    def one(item: tuple[jax.Array, ...]) -> tuple[jax.Array, jax.Array, jax.Array]:
        q, k, v, segments, mixed, log_sum, slope = item
        heads, scale = q.shape[0], q.shape[-1] ** -0.5
        own = (slope.astype(jnp.float32) * mixed.astype(jnp.float32)).sum(-1)  # [G, length]
        dq, dk, dv = [], jnp.zeros(k.shape, jnp.float32), jnp.zeros(v.shape, jnp.float32)
        for begin, end in _blocks(q.shape[1]):
            scores = _scores(limits, q, k, segments, begin, end)
            shares = jnp.exp(scores - log_sum[:, begin:end].reshape(-1, 1))
            rows = slope[:, begin:end].reshape(-1, slope.shape[-1])
            dshares = _dot(rows, v[:end].T)
            dscores = shares * (dshares - own[:, begin:end].reshape(-1, 1)) * scale
            if limits.score_cap is not None:  # the slope of tanh; shares are 0 where a score is -inf
                dscores *= 1 - jnp.square(jnp.where(shares > 0, scores, 0) / limits.score_cap)
            dscores = dscores.astype(k.dtype)
            dq.append(_by_head(_dot(dscores, k[:end]), heads))
            dk = dk.at[:end].add(_dot(dscores.T, q[:, begin:end].reshape(-1, q.shape[-1])))
            dv = dv.at[:end].add(_dot(shares.astype(v.dtype).T, rows))
        return jnp.concatenate(dq, 1).astype(q.dtype), dk.astype(k.dtype), dv.astype(v.dtype)

    return *jax.lax.map(one, (*saved, slope)), None


_attention.defvjp(_forward, _backward)


def _blocks(length: int) -> list[tuple[int, int]]:
    """First query, and the one after the last, of each block."""
    block = max(QUERY_ROWS, ceil_div(length, 4))
    return [(begin, min(begin + block, length)) for begin in range(0, length, block)]


def _scores(limits: Limits, q: jax.Array, k: jax.Array, segments: jax.Array, begin: int, end: int) -> jax.Array:
    """Scaled scores `[G * queries, keys]` of the queries `begin .. end`, -inf at keys that they do not attend to."""
    scores = _dot(q[:, begin:end].reshape(-1, q.shape[-1]), k[:end].T) * q.shape[-1] ** -0.5
    if limits.score_cap is not None:
        scores = limits.score_cap * jnp.tanh(scores / limits.score_cap)
    mask = _mask(segments[begin:end], segments[:end], jnp.arange(begin, end)[:, None], jnp.arange(end), limits.window)
    return jnp.where(jnp.tile(mask, (q.shape[0], 1)), scores, -jnp.inf)


def _mask(of_query: jax.Array, of_key: jax.Array, query: jax.Array, key: jax.Array, window: int | None) -> jax.Array:
    """Which keys each query attends to, `[..., queries, keys]`, by segments and positions in the row."""
    near = query >= key
    if window is not None:
        near &= query - key < window
    return near & (of_query[..., :, None] == of_key[..., None, :])


def _dot(a: jax.Array, b: jax.Array) -> jax.Array:
    exact = jax.lax.Precision.HIGHEST if a.dtype == jnp.float32 else None
    return jnp.dot(a, b, precision=exact, preferred_element_type=jnp.float32)


def _by_head(a: jax.Array, heads: int) -> jax.Array:
    """`[G * queries, n]` to `[G, queries, n]`."""
    return a.reshape(heads, -1, a.shape[-1])
