"""COMET's arithmetic against integer products in NumPy, scaled in float64."""

import numpy as np
import pytest
from tiny_model import HF_CONFIG

from experiments.comet import CometContext, Format, int4_kernel, round_kv, share_of_4_bits
from slora_jax.models import ModelConfig, init_random
from slora_jax.models.quantised import quantise_kernel

OUTLIERS = [7, 200, 310]


def integer_product(x, codes, scale, high) -> np.ndarray:
    """x: float64 `[T, d_in]` in the order of the codes int64 `[d_in, d_out]`, whose scale is `[groups, d_out]`."""
    y = np.zeros((len(x), codes.shape[1]))
    group = len(codes) // len(scale)
    for row, start in np.ndindex(len(x), -(-x.shape[1] // 128)):
        block = slice(128 * start, min(128 * start + 128, x.shape[1]))
        most = 127 if start < high else 7
        step = np.abs(x[row, block]).max() / most
        integers = np.rint(x[row, block] / step).astype(np.int64)
        assert np.abs(integers).max() == most
        for first in range(block.start, block.stop, group):
            part = integers[first - block.start :][:group] @ codes[first : first + group]
            y[row] += part * step * scale[first // group]
    return y


@pytest.mark.parametrize("high", [0, 1, 3])
def test_blocks_of_4_and_8_bits_are_integer_products(high) -> None:
    """A width of 320: blocks of 128, 128 and 64 channels. The outliers are in the first."""
    config = ModelConfig.from_dict(HF_CONFIG | {"hidden_size": 320, "num_hidden_layers": 1})
    _, params = init_random(config, "float32", 0)
    random = np.random.default_rng(1)
    x = random.normal(size=(5, 320)).astype(np.float32)
    x[:, OUTLIERS] *= 50
    kernels, errors = {}, []
    for stack in ("qkv", "gate_up"):
        kernel = np.asarray(params["layers"][0][stack]["kernel"])
        kernels[stack] = own = int4_kernel(kernel, np.abs(x).max(0))
        order = np.asarray(own.order)
        assert sorted(order) == list(range(320)) and set(order[:3]) == set(OUTLIERS)
        found = np.asarray(CometContext(kernels, Format(high, True)).lora(0, stack, x, None))
        stored = quantise_kernel(kernel[order], "int4")
        codes = stored["kernel"].astype(np.int64)
        exact = integer_product(x[:, order].astype(float), codes, stored["scale"].astype(float), high)
        np.testing.assert_allclose(found, exact, rtol=1e-4, atol=1e-5 * np.abs(exact).max())
        errors.append(np.abs(exact - x @ kernel).mean() / np.abs(x @ kernel).mean())
    assert share_of_4_bits(kernels, high) == (3 - high) / 3
    assert max(errors) < (1.5 if high == 0 else 0.3)


def test_keys_and_values_have_16_levels_between_their_least_and_their_largest() -> None:
    kv = np.random.default_rng(2).normal(3, 1, size=(4, 2, 64)).astype(np.float32)
    found = np.asarray(round_kv(kv))
    for head, own in zip(found.reshape(8, 64), kv.reshape(8, 64).astype(float), strict=True):
        levels = np.linspace(own.min(), own.max(), 16)
        nearest = levels[np.abs(own[:, None] - levels).argmin(1)]
        np.testing.assert_allclose(head, nearest, rtol=1e-5)
