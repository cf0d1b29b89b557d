"""The arithmetic of the accuracy study: rounding of keys and values, and attention in blocks."""

import jax
import ml_dtypes
import numpy as np
import pytest

from experiments.quantisation import causal_attention, round_kv


def rounded_in_numpy(kv: np.ndarray, kind: str) -> np.ndarray:
    if kind == "fp8":
        return np.clip(kv, -448, 448).astype(ml_dtypes.float8_e4m3fn).astype(np.float64)
    scale = (np.abs(kv).max(-1, keepdims=True) / np.float32(127)).astype(ml_dtypes.bfloat16).astype(np.float64)
    return np.clip(np.round(kv / scale), -127, 127) * scale


@pytest.mark.parametrize("kind", ["fp8", "int8"])
def test_keys_and_values_are_rounded_by_token_and_head(kind: str) -> None:
    kv = np.random.default_rng(0).standard_normal((5, 3, 8)).astype(np.float32) * [[[0.1], [1.0], [600.0]]]
    np.testing.assert_allclose(
        round_kv(kv.astype(np.float32), kind), rounded_in_numpy(kv.astype(np.float32), kind), rtol=1e-6
    )


def test_attention_in_blocks_equals_attention_at_once() -> None:
    keys = jax.random.split(jax.random.key(0), 3)
    q, k, v = (
        jax.random.normal(key, (2, 300, heads, 8)) for key, heads in zip(keys, (6, 2, 2), strict=True)
    )  # no multiple of the block's 128 rows
    expected = jax.nn.dot_product_attention(q, k, v, is_causal=True)
    np.testing.assert_allclose(causal_attention(q, k, v), expected, atol=1e-6)
