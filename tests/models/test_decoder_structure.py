"""The decoder inside a compiled step: abstract construction, order of hooks, float32 products."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from slora_jax.errors import UnsupportedModelError
from slora_jax.models import ModelConfig, RopeConfig, abstract_decoder, init_random

CONFIG = ModelConfig(
    family="qwen3",
    vocab_size=50,
    hidden_size=32,
    intermediate_size=48,
    num_layers=3,
    num_heads=4,
    num_kv_heads=2,
    head_dim=8,
    rope=RopeConfig(10000.0),
    rms_norm_eps=1e-6,
    tie_word_embeddings=False,
    max_position_embeddings=64,
    qk_norm="head",
)
TOKENS = np.arange(6, dtype=np.int32)


def forward(graphdef, context, params, tokens):
    model = nnx.merge(graphdef, params)
    return model.logits(model(tokens, jnp.arange(len(tokens)), context))


def test_abstract_and_random_trees_agree():
    graphdef, shapes = abstract_decoder(CONFIG, "bfloat16")
    random_graphdef, params = init_random(CONFIG, "bfloat16", seed=0)
    assert graphdef == random_graphdef
    assert hash(graphdef) == hash(random_graphdef)
    assert jax.tree.map(lambda x: (x.shape, x.dtype), shapes) == jax.tree.map(lambda x: (x.shape, x.dtype), params)
    assert all(isinstance(leaf, jax.ShapeDtypeStruct) for leaf in jax.tree.leaves(shapes))


def test_random_init_depends_on_the_seed_and_on_the_leaf():
    first, again, other = (init_random(CONFIG, "float32", seed)[1] for seed in (0, 0, 1))
    kernel = first["layers"][0]["qkv"]["kernel"]
    np.testing.assert_array_equal(kernel, again["layers"][0]["qkv"]["kernel"])
    assert not np.array_equal(kernel, other["layers"][0]["qkv"]["kernel"])
    assert not np.array_equal(kernel, first["layers"][1]["qkv"]["kernel"])
    assert np.std(kernel) == pytest.approx(0.02, rel=0.1)


def test_unsupported_dtype_is_refused_by_name():
    with pytest.raises(UnsupportedModelError, match="float16"):
        abstract_decoder(CONFIG, "float16")
    with pytest.raises(UnsupportedModelError, match="int5"):
        abstract_decoder(CONFIG, "int5")


@pytest.mark.parametrize("tied", [False, True])
def test_float32_products_ask_for_float32_and_rotation_tables_are_made_once(tied, dense_context):
    config = ModelConfig(**{**vars(CONFIG), "tie_word_embeddings": tied})
    graphdef, shapes = abstract_decoder(config, "float32")
    context = dense_context(jnp.zeros(6, jnp.int32), jnp.arange(6))
    tokens = jax.ShapeDtypeStruct((6,), jnp.int32)
    text = jax.jit(functools.partial(forward, graphdef, context)).lower(shapes, tokens).as_text()
    products = [line for line in text.splitlines() if "stablehlo.dot_general" in line]
    assert len(products) == 3 * (4 + 2) + 1
    assert all("HIGHEST, HIGHEST" in line for line in products)
    assert text.count("stablehlo.cosine") == 1


def test_bfloat16_logits_are_accumulated_and_returned_in_float32(dense_context):
    graphdef, shapes = abstract_decoder(CONFIG, "bfloat16")
    context = dense_context(jnp.zeros(6, jnp.int32), jnp.arange(6))
    result = jax.eval_shape(
        functools.partial(forward, graphdef, context), shapes, jax.ShapeDtypeStruct((6,), jnp.int32)
    )
    assert result.shape == (6, 50)
    assert result.dtype == jnp.float32


def test_hooks_see_every_stack_of_every_layer_in_order_with_fused_shapes(dense_context):
    calls = []

    class Recording(dense_context):
        def lora(self, layer, stack, x, y):
            calls.append((layer, stack, x.shape, y.shape))
            return y

    graphdef, params = init_random(CONFIG, "float32", seed=0)
    forward(graphdef, Recording(jnp.zeros(6, jnp.int32), jnp.arange(6)), params, TOKENS)
    per_layer = [
        ("qkv", (6, 32), (6, 32 + 2 * 16)),
        ("o", (6, 32), (6, 32)),
        ("gate_up", (6, 32), (6, 96)),
        ("down", (6, 48), (6, 32)),
    ]
    assert calls == [(layer, *call) for layer in range(3) for call in per_layer]


def test_lora_hook_equals_merging_into_the_kernel(dense_context):
    graphdef, params = init_random(CONFIG, "float32", seed=0)
    _, other = init_random(CONFIG, "float32", seed=1)
    delta = other["layers"]

    class Adding(dense_context):
        def lora(self, layer, stack, x, y):
            return y + jnp.dot(x, delta[layer][stack]["kernel"], precision="highest")

    stacks = ("qkv", "o", "gate_up", "down")
    merged = jax.tree.map(lambda leaf: leaf, params)
    for layer, modules in merged["layers"].items():
        for stack in stacks:
            modules[stack]["kernel"] = modules[stack]["kernel"] + delta[layer][stack]["kernel"]
    arguments = (jnp.zeros(6, jnp.int32), jnp.arange(6))
    added = forward(graphdef, Adding(*arguments), params, TOKENS)
    expected = forward(graphdef, dense_context(*arguments), merged, TOKENS)
    base = forward(graphdef, dense_context(*arguments), params, TOKENS)
    np.testing.assert_allclose(added, expected, rtol=0, atol=1e-5 * np.abs(expected).max())
    assert np.abs(base - expected).max() > 0.1 * np.abs(expected).max()
