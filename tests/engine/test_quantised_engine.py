"""An engine over quantised weights gives the tokens of a dense model over the dequantised ones, adapters mixed in."""

import re

import numpy as np
import pytest
from dense_reference import dense_logits
from tiny_model import one_start_at_a_time

from slora_jax import ConfigError, Engine, SamplingParams
from slora_jax.adapters import random_adapter
from slora_jax.engine.base_weights import EngineWeights
from slora_jax.models.quantised import WEIGHT_FORMATS


@pytest.fixture(scope="module", params=WEIGHT_FORMATS)
def quantised(request, model_dir, tiny):
    with one_start_at_a_time():
        engine = Engine.from_pretrained(model_dir, tiny.settings(weights=request.param, compile_ahead=False))
    with engine:
        yield engine


def test_tokens_are_those_of_the_dequantised_weights(quantised, tiny):
    """int4 in prefill and decode. The other formats give one token of more prompts, and compile no decode program."""
    params = quantised.executor.device.params
    dense = {**params, "layers": {}}
    for index, layer in params["layers"].items():
        dense["layers"][index] = {**layer}
        for stack in ("qkv", "o", "gate_up", "down"):
            codes, scale = (np.asarray(layer[stack][name]).astype(np.float64) for name in ("kernel", "scale"))
            kernel = codes * np.repeat(scale, len(codes) // len(scale), axis=0)
            dense["layers"][index][stack] = {"kernel": kernel}
            assert np.abs(kernel - np.asarray(tiny.params["layers"][index][stack]["kernel"])).max() > 1e-3
    adapters = {"a": random_adapter(tiny.geometry, {"q": 4, "v": 4, "down": 9}, seed=1), "b": None}
    adapters["b"] = random_adapter(tiny.geometry, {"o": 3, "gate": 8}, seed=2)
    for name, adapter in adapters.items():
        quantised.load_adapter(name, adapter)
    decodes = quantised.model.weights == "int4"
    starts = [30] if decodes else range(30, 38)
    names = ["a", None, "b"] * len(starts)
    prompts = [list(range(start, start + 30)) for start in starts for _ in adapters | {"base": None}]
    outputs = quantised.generate(prompts, SamplingParams(max_tokens=12 if decodes else 1, ignore_eos=True), names)
    for name, prompt, output in zip(names, prompts, outputs, strict=True):
        tokens = output.token_ids
        logits = dense_logits(tiny.config, dense, prompt + tokens[:-1], adapters.get(name))[len(prompt) - 1 :]
        below = logits.max(-1) - logits[np.arange(len(tokens)), tokens]
        assert (below / np.abs(logits).max()).max() < 1e-5, name
    assert len({tuple(output.token_ids) for output in outputs}) >= 3


def test_merged_adapters_and_other_formats_are_refused(quantised, tiny):
    graphdef, params = quantised.executor.device.spec.graphdef, quantised.executor.device.params
    with pytest.raises(ConfigError, match=re.escape("EngineConfig.lora='merge': adapters cannot be merged into")):
        Engine(quantised.model, graphdef, params, tiny.settings(lora="merge"))
    with pytest.raises(ConfigError, match="EngineConfig.weights='int8': the model in memory has weights="):
        tiny.engine(weights="int8")


def test_norms_for_dora_are_those_of_the_dequantised_rows(quantised, rng):
    device = quantised.executor.device
    weights = EngineWeights(lambda: device.params, quantised.store.geometry, 16, norms=False)
    a, b = rng.standard_normal((3, 32)).astype(np.float32), rng.standard_normal((16, 3)).astype(np.float32)
    linear = {name: np.asarray(leaf) for name, leaf in device.params["layers"][1]["qkv"].items()}
    kernel = linear["kernel"].astype(np.float64) * np.repeat(linear["scale"], 32 // len(linear["scale"]), axis=0)
    expected = np.linalg.norm(kernel.T[32:48] + b @ a, axis=1)  # k is after the 32 columns of q
    np.testing.assert_allclose(weights.row_norms(1, "k", a, b), expected, rtol=1e-5)
