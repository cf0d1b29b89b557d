"""Compiles a small decode step for an H200; run as a program, so that XLA's flags can be its own."""

from pallas_kernels.devices import compiling_for
from pallas_kernels.targets import TARGETS, compile_for
from slora_jax.engine import EngineConfig
from slora_jax.engine.config import Bucket
from slora_jax.engine.sizing import pool_shape, step_spec
from slora_jax.engine.step import make_step, step_shapes
from slora_jax.models import ModelConfig, abstract_decoder

MODEL = {
    "model_type": "llama",
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_hidden_layers": 2,
    "vocab_size": 512,
    "max_position_embeddings": 256,
    "rms_norm_eps": 1e-5,
}

if __name__ == "__main__":
    target, model = TARGETS["h200"], ModelConfig.from_dict(MODEL)
    config = EngineConfig(dtype="bfloat16", max_num_seqs=16, max_num_batched_tokens=64, max_lora_rank=32, num_pages=500)
    spec = step_spec(model, *abstract_decoder(model, config.dtype), config, pool_shape(model, config))
    with compiling_for(target.device):
        layout = spec.layout(Bucket(16, 16, decode=True))
        compile_for(target, make_step(spec, layout, with_lora=True), *step_shapes(spec, layout))
