"""The whole engine in bfloat16 against itself in float32, over the same (bfloat16-valued) weights."""

import jax
import jax.numpy as jnp
import numpy as np

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
    head_dim=16,
    rope=RopeConfig(theta=10000.0),
    rms_norm_eps=1e-5,
    tie_word_embeddings=False,
    max_position_embeddings=512,
)
PROMPTS = [list(range(1, 5 + 7 * i)) for i in range(8)]
ADAPTERS = [f"adapter-{i % 4}" if i % 3 else None for i in range(8)]


def _logits(dtype: str, adapters: list[str | None]) -> np.ndarray:
    """First-token logits `[requests, vocab]`."""
    graphdef, _ = abstract_decoder(MODEL, dtype)
    params = init_random(MODEL, "float32", 0)[1]
    params = jax.tree.map(lambda x: (5 * x).astype(jnp.bfloat16).astype(dtype) if x.ndim == 2 else x, params)
    config = EngineConfig(
        dtype=dtype,
        num_pages=200,
        max_seqs=8,
        max_tokens_per_step=32,
        max_rank=32,
        decode_buckets=(8,),
        mixed_buckets=(32,),
        keep_logits=True,
        progress=False,
    )
    with Engine(MODEL, graphdef, params, config) as engine:
        for i, rank in enumerate((4, 8, 16, 32)):
            engine.load_adapter(f"adapter-{i}", random_adapter(engine.store.geometry, rank, seed=i, scale_of_b=0.3))
        outputs = engine.generate(PROMPTS, SamplingParams(max_tokens=1), adapters)
        engine.check()
    return np.stack([output.logits[0] for output in outputs])


def test_bfloat16_logits_are_float32s_up_to_rounding():
    exact, rounded = _logits("float32", ADAPTERS), _logits("bfloat16", ADAPTERS)
    scale = abs(exact).max(axis=1)
    assert (abs(exact - rounded).max(axis=1) / scale < 0.03).all()
    base = _logits("float32", [None] * 8)
    changed = abs(exact - base).max(axis=1) / scale
    with_adapter = np.array([adapter is not None for adapter in ADAPTERS])
    assert (changed[with_adapter] > 0.2).all()  # the adapters matter far more than the rounding
    assert (changed[~with_adapter] < 1e-5).all()
