"""One of several processes that serve one model together: `serve_together.py PROCESS PROCESSES PORT`, or alone on one
device: `serve_together.py 0 1 0`. Prints its tokens as JSON."""

import json
import math
import os
import sys

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("PJRT_NPROC", "8")

import jax
import numpy as np

from slora_jax import Engine, EngineConfig, SamplingParams
from slora_jax.adapters import random_adapter
from slora_jax.engine import adapter_geometry
from slora_jax.models import ModelConfig, init_random

HF_CONFIG = {
    "model_type": "llama",
    "vocab_size": 101,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}


def main(process: int, processes: int, port: int) -> None:
    if processes > 1:
        jax.distributed.initialize(f"127.0.0.1:{port}", processes, process)
    here = jax.local_devices()[0]
    model = ModelConfig.from_dict(HF_CONFIG)
    with jax.default_device(here):
        graphdef, params = init_random(model, "float32", seed=0)
        params = jax.tree.map(lambda x: x * (2 / (0.02 * math.sqrt(x.shape[0])) if x.ndim > 1 else 1.0), params)
    config = EngineConfig(
        dtype="float32",
        num_pages=40,
        page_size=8,
        max_seqs=4,
        max_tokens_per_step=16,
        max_model_len=48,
        max_rank=8,
        decode_buckets=(4,),
        mixed_buckets=(16,),
        prefetch=0,
        tp=processes,
        compilation_cache_dir=None,
        progress=False,
    )
    rng = np.random.default_rng(0)
    prompts = [rng.integers(0, 101, length).tolist() for length in (5, 17, 30, 2, 9, 12)]
    geometry = adapter_geometry(model, config.page_size)
    with Engine(model, graphdef, params, config) as engine:
        for rank in (1, 3, 8):
            engine.load_adapter(str(rank), random_adapter(geometry, rank, seed=rank))
        sampling = [SamplingParams(max_tokens=10, ignore_eos=True, temperature=0.5 * (i % 2)) for i in range(6)]
        outputs = engine.generate(prompts, sampling, [None, "1", "3", "8", "8", None])
        print(json.dumps([output.token_ids for output in outputs]), flush=True)


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
