"""Quantised kernels: rounding, products, loading, cache, and shards."""

import dataclasses
import logging

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx, traverse_util
from jax.sharding import PartitionSpec as P

from slora_jax.errors import ConfigError, UnsupportedModelError
from slora_jax.models import ModelConfig, init_random, load_model
from slora_jax.models.init import layer_graph
from slora_jax.models.layers import Linear
from slora_jax.models.quantised import WEIGHT_FORMATS, num_bytes, quantise_kernel
from slora_jax.models.shards import shard_params
from slora_jax.parallel.mesh import AXIS, tensor_parallel

EXPERTS = (("gate_up", "gate_up_scale"), ("down", "down_scale"))


def exact(linear: dict, name: str = "kernel", scale: str = "scale") -> np.ndarray:
    """The value `[d_in, d_out]` of a quantised kernel, or of experts' `[E, d_in, d_out]`, float64."""
    codes, scales = (np.asarray(linear[key]).astype(np.float64) for key in (name, scale))
    return codes * np.repeat(scales, codes.shape[-2] // scales.shape[-2], axis=-2)


def dequantised(params):
    """The parameters with every quantised kernel as float32."""

    def dense(part):
        if not isinstance(part, dict):
            return part
        if {"kernel", "scale"} <= part.keys():
            return {"kernel": jnp.asarray(exact(part), jnp.float32)} | {k: v for k, v in part.items() if k == "bias"}
        if "router" in part:
            experts = {name: jnp.asarray(exact(part, *name), jnp.float32) for name in EXPERTS}
            return {name: experts[name, scale] for name, scale in EXPERTS} | {"router": part["router"]}
        return {key: dense(value) for key, value in part.items()}

    return dense(params)


def quantised_model(directory, weights, *, parallel=None, cache_dir=None, dtype="float32"):
    config = dataclasses.replace(ModelConfig.from_directory(directory), weights=weights)
    return load_model(directory, dtype, cache_dir, False, parallel, config)


def test_kernels_are_rounded_to_the_nearest_code(rng):
    kernel = rng.standard_normal((576, 40)).astype(np.float32) * np.geomspace(1e-3, 10, 40, dtype=np.float32)
    kernel[:, 3] = 0
    largest = np.abs(kernel).max(0)
    error = {}
    for weights in WEIGHT_FORMATS:
        stored = quantise_kernel(kernel, weights)
        assert stored["scale"].shape == (9 if weights == "int4" else 1, 40)  # groups of 64: 128 does not divide 576
        error[weights] = np.abs(exact(stored) - kernel)
    assert (error["int8"] <= largest / 254 * 1.001).all()
    assert (error["fp8"] <= np.maximum(np.abs(kernel) / 16, largest / 448 / 1024) * 1.001).all()
    groups = kernel.reshape(9, 64, 40)
    step = np.maximum(np.abs(groups).max(1, keepdims=True), 1e-30) / 7
    plain = np.square(np.rint(groups / step) * step - groups).sum(1)  # by the largest magnitude over 7
    own = np.square(error["int4"]).reshape(9, 64, 40).sum(1)
    assert own.sum(0)[4:].max() > 0 and (own.sum((0, 1)) < 0.85 * plain.sum((0, 1))).all()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_products_are_those_of_the_dequantised_kernel(dtype, rng):
    kernel, x = rng.standard_normal((256, 48)).astype(np.float32), jnp.asarray(rng.standard_normal((5, 256)), dtype)
    for weights in WEIGHT_FORMATS:
        stored = quantise_kernel(kernel, weights)
        graphdef, state = nnx.split(Linear(256, 48, False, jnp.dtype(dtype), weights))
        assert {k: (v.shape, v.dtype) for k, v in nnx.to_pure_dict(state).items()} == {
            k: (v.shape, v.dtype) for k, v in stored.items()
        }
        y = jax.jit(lambda p, x, graphdef=graphdef: nnx.merge(graphdef, p)(x))(stored, x)
        if dtype == "float32":  # training over frozen kernels needs the slope of the input
            slope = jax.grad(lambda x, p=stored, graphdef=graphdef: nnx.merge(graphdef, p)(x).sum())(x)
            np.testing.assert_allclose(slope[0], exact(stored).sum(1), atol=1e-4)
        expected = np.asarray(x, np.float64) @ exact(stored)
        assert y.dtype == dtype
        np.testing.assert_allclose(
            np.asarray(y, np.float64), expected, atol=np.abs(expected).max() * (1e-6 if dtype == "float32" else 0.01)
        )


@pytest.mark.parametrize(("weights", "family"), [("int8", "mixtral"), ("fp8", "qwen2"), ("int4", "mixtral")])
def test_a_quantised_model_is_the_decoder_over_its_dequantised_kernels(
    weights, family, make_checkpoint, tmp_path, decoder_logits, caplog
):
    """Mixtral's experts have 64 and 112 inputs: of int4, one group and seven."""
    directory, _ = make_checkpoint(family, num_hidden_layers=1)
    graphdef, params, _ = quantised_model(directory, weights, cache_dir=tmp_path)
    plain_graph, plain, _ = load_model(directory, "float32", progress=False)
    for stack in ("qkv", "o", *(("gate_up", "down") if family == "qwen2" else ())):
        linear, kernel = params["layers"][0][stack], np.asarray(plain["layers"][0][stack]["kernel"])
        for name, expected in quantise_kernel(kernel, weights).items():
            np.testing.assert_array_equal(np.asarray(linear[name]), expected)
    for name, scale in EXPERTS if family == "mixtral" else ():
        own = params["layers"][0]["experts"]
        for expert, kernel in enumerate(np.asarray(plain["layers"][0]["experts"][name])):
            expected = quantise_kernel(kernel, weights)
            np.testing.assert_array_equal(np.asarray(own[name][expert]), expected["kernel"])
            np.testing.assert_array_equal(np.asarray(own[scale][expert]), expected["scale"])
    prompt = [np.arange(9)]
    np.testing.assert_allclose(
        decoder_logits(graphdef, params, prompt), decoder_logits(plain_graph, dequantised(params), prompt), atol=2e-5
    )
    cached = quantised_model(directory, weights, cache_dir=tmp_path)
    assert jax.tree.all(
        jax.tree.map(lambda a, b: a.dtype == b.dtype and (np.asarray(a) == np.asarray(b)).all(), params, cached[1])
    )
    load_model(directory, "float32", tmp_path, progress=False)
    assert len(list(tmp_path.iterdir())) == 2, "weights of another format have their own entry"
    assert not [record for record in caplog.records if record.levelno >= logging.WARNING]


@pytest.mark.parametrize("weights", WEIGHT_FORMATS)
def test_shards_hold_the_codes_of_the_whole_model(weights, make_checkpoint, dense_context):
    """Two shards of 128 inputs of o and down hold the groups of the whole 256. The layers' outputs are equal."""
    directory, _ = make_checkpoint("llama", num_hidden_layers=1, intermediate_size=256, head_dim=64)
    _, whole, config = quantised_model(directory, weights)
    parallel = tensor_parallel(config, 2)
    _, params, _ = quantised_model(directory, weights, parallel=parallel)

    def shard(number: int, stack: str) -> np.ndarray:
        on = parallel.devices[number]
        parts = {k: leaf.addressable_shards for k, leaf in params["layers"][0][stack].items()}
        return exact({k: next(p.data for p in found if p.device == on) for k, found in parts.items()})

    layer = whole["layers"][0]
    for stack, axis in (("o", 0), ("down", 0)):
        np.testing.assert_array_equal(np.concatenate([shard(0, stack), shard(1, stack)], axis), exact(layer[stack]))
    (gate, up), halves = np.split(exact(layer["gate_up"]), 2, 1), [shard(n, "gate_up") for n in (0, 1)]
    np.testing.assert_array_equal(np.concatenate([half[:, :128] for half in halves], 1), gate)
    np.testing.assert_array_equal(np.concatenate([half[:, 128:] for half in halves], 1), up)

    class Context(dense_context):
        def __init__(self, reduce):
            super().__init__(jnp.zeros(6, jnp.int32), jnp.arange(6))
            self.reduce = reduce

    def run(config, params, reduce=lambda y: y):
        x = jax.random.normal(jax.random.key(0), (6, 64))
        tables = ((jnp.ones((6, 1, 32)), jnp.zeros((6, 1, 32))),)
        return nnx.merge(layer_graph(config, config.kind(0), "float32"), params)(x, tables, Context(reduce))

    own = parallel.shards.of_model(config)
    specs = jax.tree.map(lambda leaf: leaf.sharding.spec, params["layers"][0])
    sharded = jax.shard_map(
        lambda params: run(own, params, lambda y: jax.lax.psum(y, AXIS)),
        mesh=parallel.mesh,
        in_specs=(specs,),
        out_specs=P(),
        check_vma=False,
    )
    expected = jax.jit(lambda params: run(config, params))(layer)
    np.testing.assert_allclose(jax.jit(sharded)(params["layers"][0]), expected, atol=2e-5)
    with pytest.raises(ConfigError, match=r"weights='.*': quantised parameters in memory cannot be sharded"):
        shard_params(config, whole, parallel)


@pytest.mark.parametrize("weights", ["int8", "int4"])
def test_shards_hold_the_codes_of_the_experts(weights, make_checkpoint):
    """Each of two shards holds half of the hidden layer's width of every expert, in whole groups."""
    directory, _ = make_checkpoint("mixtral", num_hidden_layers=1, num_local_experts=3, intermediate_size=256)
    _, whole, config = quantised_model(directory, weights)
    parallel = tensor_parallel(config, 2)
    params = quantised_model(directory, weights, parallel=parallel)[1]["layers"][0]["experts"]
    for name, scale in EXPERTS:
        shards = []
        for device in parallel.devices:
            parts = {k: next(p.data for p in params[k].addressable_shards if p.device == device) for k in (name, scale)}
            shards.append(exact(parts, name, scale))
        expected = exact(whole["layers"][0]["experts"], name, scale)
        if name == "down":
            np.testing.assert_array_equal(np.concatenate(shards, 1), expected)
        else:
            halves = [shard[..., half] for half in (slice(128), slice(128, None)) for shard in shards]
            np.testing.assert_array_equal(np.concatenate(halves, 2), expected)


def test_random_weights_are_quantised_and_counted():
    fields = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 1, "num_attention_heads": 4}
    config = ModelConfig.from_dict({"model_type": "llama", "vocab_size": 32, "max_position_embeddings": 8, **fields})
    kernels = 64 * (3 * 64) + 64 * 64 + 64 * 256 + 128 * 64
    nbytes = {}
    for weights in WEIGHT_FORMATS:
        _, params = init_random(dataclasses.replace(config, weights=weights), "float32", 0)
        layer = params["layers"][0]
        assert 0.015 < exact(layer["gate_up"]).std() < 0.025
        flat = traverse_util.flatten_dict(layer)
        nbytes[weights] = sum(num_bytes(leaf) for path, leaf in flat.items() if path[-1] == "kernel")
    assert nbytes == {"int8": kernels, "fp8": kernels, "int4": kernels // 2}
    narrow = dataclasses.replace(config, intermediate_size=120, weights="int4")
    with pytest.raises(UnsupportedModelError, match=r"weights='int4': a projection has 120 inputs on each device"):
        init_random(narrow, "float32", 0)
