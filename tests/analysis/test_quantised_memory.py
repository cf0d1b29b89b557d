"""The compiled GPU step reads quantised weights in its products: no weight is written out in bfloat16 first.

XLA converts fp8 to bfloat16 inside a product only for Hopper. On an A100 it writes each weight out.
"""

import dataclasses

import pytest
from compile_step import MODEL

from pallas_kernels.devices import compiling_for
from pallas_kernels.targets import TARGETS, compile_for
from slora_jax.engine import EngineConfig
from slora_jax.engine.config import Bucket
from slora_jax.engine.sizing import pool_shape, step_spec
from slora_jax.engine.step import make_step, step_shapes
from slora_jax.models import ModelConfig, abstract_decoder

FFN = 8192


def temporary_bytes(target_name: str, weights: str | None) -> int:
    """Temporary bytes of a decode step, one layer, whose largest kernels are `[256, 2 FFN]`."""
    target, config = TARGETS[target_name], EngineConfig(
        dtype="bfloat16", max_num_seqs=16, max_num_batched_tokens=64, max_lora_rank=32, num_pages=500
    )  # fmt: skip
    fields = MODEL | {"num_hidden_layers": 1, "intermediate_size": FFN}
    model = dataclasses.replace(ModelConfig.from_dict(fields), weights=weights)
    spec = step_spec(model, *abstract_decoder(model, config.dtype), config, pool_shape(model, config))
    with compiling_for(target.device):
        layout = spec.layout(Bucket(16, 16, decode=True))
        step = make_step(spec, layout, with_lora=False)
    # XLA's default, in place of the suite's 0: int4 products have kernels only if it chooses among them.
    options = {"xla_gpu_autotune_level": 4}
    compiled = compile_for(target, step, *step_shapes(spec, layout), options=options)
    return compiled.memory_analysis().temp_size_in_bytes


@pytest.mark.parametrize(
    ("target", "weights", "copies"),
    [
        ("h200", "int8", False),
        ("h200", "int4", False),
        ("a100", "fp8", True),
    ],
)
def test_weights_are_not_written_out_in_bfloat16(target, weights, copies):
    smallest_kernel = 256 * FFN * 2  # of the two large ones, in bfloat16
    assert (temporary_bytes(target, weights) > smallest_kernel) == copies
