"""Memory of a real model's decode step, and kernels of its steps, for an absent GPU."""

import dataclasses
import re
from collections import Counter
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from pallas_kernels.devices import DEVICES, compiling_for
from pallas_kernels.targets import TARGETS, compile_for, lower_for
from slora_jax.analysis import KernelUse, kernels_in, pool_use
from slora_jax.engine import EngineConfig
from slora_jax.engine.config import Bucket
from slora_jax.engine.sizing import pool_shape, step_spec
from slora_jax.engine.step import make_step, step_shapes
from slora_jax.memory import PoolShape
from slora_jax.models import ModelConfig, abstract_decoder
from slora_jax.models.config import read_json

LLAMA_3_8B = Path(__file__).parents[2] / "experiments" / "models" / "llama-3-8b.json"
LAYERS = 2
POOL_PAGES, PAGE_BYTES = 140_000, 2 * 16 * 1024 * 2


@cache
def step(decode: bool) -> tuple[Any, PoolShape]:
    """A step on an H200, and its pool: 256 sequences that decode, compiled; or 2,048 rows of a mixed batch, lowered."""
    target = TARGETS["h200"]
    model = dataclasses.replace(ModelConfig.from_dict(read_json(LLAMA_3_8B)), num_layers=LAYERS)
    config = EngineConfig(
        dtype="bfloat16", max_num_seqs=256, max_num_batched_tokens=2048, max_lora_rank=64, num_pages=POOL_PAGES
    )
    spec = step_spec(model, *abstract_decoder(model, config.dtype), config, pool_shape(model, config))
    make = compile_for if decode else lower_for
    with compiling_for(target.device):
        layout = spec.layout(Bucket(tokens=256 if decode else 2048, seqs=256, decode=decode))
        return make(target, make_step(spec, layout, with_lora=True), *step_shapes(spec, layout)), spec.pool


def kernels(decode: bool) -> list[KernelUse]:
    return kernels_in(step(decode)[0], DEVICES["h200"])


def test_temporaries_are_little_more_than_the_logits() -> None:
    use = pool_use(*step(decode=True))
    logits = 4 * 256 * 128_256
    assert use.copies == ()
    assert use.temp_bytes < logits + 100e6  # nothing of the size of a gathered context or of gathered adapters


@pytest.mark.parametrize("decode", [True, False], ids=["decode", "mixed"])
def test_kernels_address_the_pool_with_64_bits(decode) -> None:
    """A layer's pool has 2^32 elements and more. A page's bytes, or a tile's, are factors of a 64-bit product."""
    assert POOL_PAGES * PAGE_BYTES > 2 * 2**32
    factor = f"({PAGE_BYTES}|{PAGE_BYTES // 2})"
    for kernel in kernels(decode):
        assert re.search(rf"(mul|mad)\.wide\.[su]32\s[^;]*, {factor}[,;]|shl\.b64\s[^;]*, 1[56];", kernel.ptx)


@pytest.mark.parametrize("decode", [True, False], ids=["decode", "mixed"])
def test_a_layer_launches_eight_kernels_for_lora_and_one_for_attention(decode) -> None:
    launches = Counter[str]()
    for kernel in kernels(decode):
        launches[kernel.name] += kernel.count
        assert (kernel.backend, kernel.spill_bytes) == ("triton", 0)
    lora = {"lora_shrink_kernel": 4 * LAYERS, "lora_expand_kernel": 4 * LAYERS}
    assert launches == {"paged_attention_kernel": LAYERS, **lora}
