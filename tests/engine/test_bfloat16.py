"""The engine in bfloat16, with the XLA reference and with interpreted GPU kernels, compared with float64 logits of the
same (bfloat16) weights."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from dense_reference import dense_logits

from slora_jax import Engine, EngineConfig, SamplingParams
from slora_jax.adapters import random_adapter
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


@pytest.mark.parametrize("kernels", ["xla", "triton"])
def test_logits_agree_with_float64_up_to_rounding_and_adapters_change_them_far_more(kernels):
    graphdef, _ = abstract_decoder(MODEL, "bfloat16")
    params = init_random(MODEL, "float32", 0)[1]
    params = jax.tree.map(lambda x: (5 * x).astype(jnp.bfloat16) if x.ndim == 2 else x, params)
    config = EngineConfig(
        dtype="bfloat16",
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
        adapters = {
            f"adapter-{i}": random_adapter(engine.store.geometry, rank, seed=i, scale_of_b=0.3)
            for i, rank in enumerate((4, 8, 16, 32))
        }
        for name, adapter in adapters.items():
            engine.load_adapter(name, adapter)
        outputs = engine.generate(
            PROMPTS, SamplingParams(max_tokens=3), ADAPTERS
        )  # one prefill step, then decode steps
        engine.check()
    for prompt, name, output in zip(PROMPTS, ADAPTERS, outputs, strict=True):
        tokens = prompt + output.token_ids[:-1]
        exact, base = (
            dense_logits(MODEL, params, tokens, adapter)[len(prompt) - 1 :] for adapter in (adapters.get(name), None)
        )
        assert output.logits.shape == exact.shape == (3, MODEL.vocab_size)
        largest = np.abs(exact).max(-1)
        assert (np.abs(output.logits - exact).max(-1) / largest).max() < 0.03
        assert name is None or (np.abs(exact - base).max(-1) / largest).min() > 0.2
