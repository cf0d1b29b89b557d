"""What the step of a real model takes on a GPU that is not there."""

import dataclasses
from pathlib import Path

import pytest

from pallas_kernels.devices import compiling_for
from slora_jax.analysis import TARGETS, KernelUse, compile_for, kernels_in, pool_use
from slora_jax.engine import EngineConfig
from slora_jax.engine.batch import Bucket
from slora_jax.engine.runner import pool_shape, step_spec
from slora_jax.engine.step import make_step, step_shapes
from slora_jax.models import ModelConfig, abstract_decoder
from slora_jax.models.config import read_json

LLAMA_3_8B = Path(__file__).parents[2] / "experiments" / "models" / "llama-3-8b.json"
LAYERS = 2


@pytest.fixture(scope="module")
def decode() -> tuple[int, list[KernelUse]]:
    """Temporaries and kernels of a decode step of 256 sequences with adapters, on an H200."""
    target = TARGETS["h200"]
    model = dataclasses.replace(ModelConfig.from_dict(read_json(LLAMA_3_8B)), num_layers=LAYERS)
    config = EngineConfig(max_seqs=256, max_tokens_per_step=2048, max_rank=64, num_pages=20_000)
    spec = step_spec(model, *abstract_decoder(model, config.dtype), config, pool_shape(model, config))
    with compiling_for(target.device):
        layout = spec.layout(Bucket(tokens=256, seqs=256, decode=True))
    compiled = compile_for(target, make_step(spec, layout, with_lora=True), *step_shapes(spec, layout))
    use = pool_use(compiled, spec.pool)
    assert use.copies == ()
    return use.temp_bytes, kernels_in(compiled, target.device)


def test_temporaries_are_little_more_than_the_logits(decode) -> None:
    logits = 4 * 256 * 128_256
    assert decode[0] < logits + 100e6


def test_a_layer_has_few_launches_of_custom_kernels(decode) -> None:
    launches = {"lora": 0, "attention": 0}
    for kernel in decode[1]:
        launches["lora" if "lora" in kernel.name else "attention"] += kernel.count
        assert kernel.spill_bytes == 0
    assert 0 < launches["lora"] <= 8 * LAYERS
    assert 0 < launches["attention"] <= 2 * LAYERS
