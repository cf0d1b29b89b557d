"""The engine in bfloat16 compared with itself in float32, over the same (bfloat16) weights: with the XLA reference and
with interpreted GPU kernels."""

from functools import cache

import jax
import jax.numpy as jnp
import pytest

from slora_jax import Engine, EngineConfig, SamplingParams
from slora_jax.adapters import random_adapter
from slora_jax.engine.outputs import RequestOutput
from slora_jax.models import ModelConfig, RopeConfig, abstract_decoder, init_random

MODEL = ModelConfig(
    family="llama",
    vocab_size=256,
    hidden_size=64,
    intermediate_size=128,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    head_dim=64,
    rope=RopeConfig(theta=10000.0),
    rms_norm_eps=1e-5,
    tie_word_embeddings=False,
    max_position_embeddings=512,
)
PROMPTS = [list(range(1, 5 + 7 * i)) for i in range(8)]
ADAPTERS = [f"adapter-{i % 4}" if i % 3 else None for i in range(8)]


@cache
def _generated(dtype: str, with_adapters: bool, kernels: str = "xla") -> list[RequestOutput]:
    """Returns greedy outputs of three tokens, with their logits."""
    graphdef, _ = abstract_decoder(MODEL, dtype)
    params = init_random(MODEL, "float32", 0)[1]
    params = jax.tree.map(lambda x: (5 * x).astype(jnp.bfloat16).astype(dtype) if x.ndim == 2 else x, params)
    config = EngineConfig(
        dtype=dtype,
        num_pages=200,
        max_num_seqs=8,
        max_num_batched_tokens=32,
        max_lora_rank=32,
        kernels=kernels,
        decode_buckets=(8,),
        mixed_buckets=(32,),
        keep_logits=True,
        compile_ahead=False,
        progress=False,
    )
    with Engine(MODEL, graphdef, params, config) as engine:
        for i, rank in enumerate((4, 8, 16, 32)):
            engine.load_adapter(f"adapter-{i}", random_adapter(engine.store.geometry, rank, seed=i, scale_of_b=0.3))
        outputs = engine.generate(PROMPTS, SamplingParams(max_tokens=3), ADAPTERS if with_adapters else [None] * 8)
        engine.check()
    return outputs


@pytest.mark.parametrize("kernels", ["xla", "triton"])
def test_bfloat16_logits_agree_with_float32_up_to_rounding(kernels):
    compared = 0
    for exact, rounded in zip(_generated("float32", True), _generated("bfloat16", True, kernels), strict=True):
        for position in range(3):  # one prefill step, then decode steps
            if exact.token_ids[:position] != rounded.token_ids[:position]:
                break  # a near tie was decided otherwise: the contexts differ from here on
            error = abs(exact.logits[position] - rounded.logits[position]).max()
            assert error / abs(exact.logits[position]).max() < 0.03
            compared += 1
    assert compared >= 20


def test_adapters_change_logits_far_more_than_rounding():
    for adapter, tuned, base in zip(ADAPTERS, _generated("float32", True), _generated("float32", False), strict=True):
        changed = abs(tuned.logits[0] - base.logits[0]).max() / abs(tuned.logits[0]).max()
        assert changed < 1e-5 if adapter is None else changed > 0.2
