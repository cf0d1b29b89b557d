"""The compiled step updates the pool in place: read from the program for the CPU, and for an H200 without a device."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import pytest

from pallas_kernels.devices import compiling_for
from pallas_kernels.targets import TARGETS, compile_for
from slora_jax.analysis import pool_use
from slora_jax.engine.batch import Bucket
from slora_jax.engine.layered import LayeredStep
from slora_jax.engine.step import make_step, step_shapes
from slora_jax.engine.step_spec import StepSpec
from slora_jax.memory import PoolShape
from slora_jax.memory.pool import set_table_row, upload_layer, upload_layers
from slora_jax.models import ModelConfig, RopeConfig, abstract_decoder

DECODE = Bucket(tokens=16, seqs=16, decode=True)
MIXED = Bucket(tokens=64, seqs=16, decode=False)


def _spec(
    layers: int, hidden: int, heads: int, kv_heads: int, head_dim: int, ffn: int, dtype: str, num_pages: int
) -> StepSpec:
    model = ModelConfig(
        family="llama",
        vocab_size=512,
        hidden_size=hidden,
        intermediate_size=ffn,
        num_layers=layers,
        num_heads=heads,
        num_kv_heads=kv_heads,
        head_dim=head_dim,
        rope=RopeConfig(theta=10000.0),
        rms_norm_eps=1e-5,
        tie_word_embeddings=False,
        max_position_embeddings=1024,
    )
    graphdef, params = abstract_decoder(model, dtype)
    pool = PoolShape(
        num_layers=layers,
        num_pages=num_pages,
        page_size=16,
        width=model.kv_width,
        dtype=dtype,
        adapter_slots=32,
        max_adapter_pages=100,
    )
    return StepSpec(model, graphdef, params, pool, max_num_seqs=16, max_pages_per_seq=64, max_rank=64)


SMALL = _spec(layers=2, hidden=64, heads=4, kv_heads=2, head_dim=16, ffn=128, dtype="float32", num_pages=333)
# One of Llama-3-8B's layers: `analysis/test_step_memory.py` has a step of two.
LLAMA_8B = _spec(layers=1, hidden=4096, heads=32, kv_heads=8, head_dim=128, ffn=14336, dtype="bfloat16", num_pages=4000)


def _narrow(spec: StepSpec) -> StepSpec:
    """The spec with int8 keys and values."""
    return replace(spec, pool=replace(spec.pool, kv_dtype="int8", head_dim=spec.model.head_dim))


@pytest.mark.parametrize("bucket", [DECODE, MIXED], ids=lambda b: b.name)
def test_cpu_step_updates_the_pool_in_place(bucket):
    one_layer = replace(SMALL.pool, num_layers=1)
    layout = SMALL.layout(bucket)
    plain, with_lora = (LayeredStep(SMALL, layout, lora).parts for lora in (False, True))
    extras = LayeredStep(replace(SMALL, adapter_extras=True), layout, "extras").parts
    for part in [*with_lora, *(part for part in [*plain, *extras] if part.name.endswith("_layer"))]:
        use = pool_use(part.function.lower(*part.shapes()).compile(), one_layer)
        assert use.copies == ()
        assert use.temp_bytes < use.pool_bytes
        if part.name.endswith("_layer"):
            assert use.aliased_bytes >= use.pool_bytes


def test_cpu_step_updates_narrow_pages_and_their_scales_in_place():
    spec = _narrow(SMALL)
    (layer,) = (part for part in LayeredStep(spec, spec.layout(MIXED), True).parts if part.name.endswith("_layer"))
    use = pool_use(layer.function.lower(*layer.shapes()).compile(), replace(spec.pool, num_layers=1))
    assert use.aliased_bytes >= use.pool_bytes and use.copies == ()


@pytest.mark.parametrize(
    ("bucket", "lora", "is_narrow"),
    [(MIXED, "extras", False), (DECODE, True, True)],  # extras are added to plain LoRA, scales to the pages
    ids=["mixed_extras", "decode_int8"],
)
def test_h200_step_updates_the_pool_in_place(bucket, lora, is_narrow):
    spec = replace(_narrow(LLAMA_8B) if is_narrow else LLAMA_8B, adapter_extras=lora == "extras")
    layout = spec.layout(bucket)
    target = TARGETS["h200"]
    with compiling_for(target.device):
        step, shapes = make_step(spec, layout, lora), step_shapes(spec, layout)
    compiled = compile_for(target, step, *shapes)
    use = pool_use(compiled, spec.pool)
    assert use.aliased_bytes >= use.pool_bytes
    assert use.copies == ()
    assert use.temp_bytes < use.pool_bytes / 2


def test_upload_updates_the_pool_in_place():
    shape = SMALL.pool
    page = jax.ShapeDtypeStruct((4,), jnp.int32)
    contents = jax.ShapeDtypeStruct((2, 4, 2, shape.page_size, shape.width), jnp.float32)
    number = jax.ShapeDtypeStruct((), jnp.int32)
    for compiled, part in (
        (upload_layers.lower(shape.pool_struct(), page, contents).compile(), shape),
        (upload_layer.lower(shape.pool_struct()[0], page, contents, number).compile(), replace(shape, num_layers=1)),
    ):
        use = pool_use(compiled, part)
        assert use.aliased_bytes == use.pool_bytes
        assert use.copies == ()
    row = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape[1:], leaf.dtype), shape.table_struct())
    table = set_table_row.lower(shape.table_struct(), number, row).compile().memory_analysis()
    assert table.alias_size_in_bytes >= 4 * shape.adapter_slots * (shape.max_adapter_pages + 10)


def test_check_detects_a_copied_pool():
    shape = SMALL.pool

    def update(pool, value):
        return tuple(layer.at[3].set(value) for layer in pool)

    args = (shape.pool_struct(), jax.ShapeDtypeStruct((), jnp.float32))
    use = pool_use(jax.jit(update).lower(*args).compile(), shape)  # not donated: XLA must copy
    assert use.aliased_bytes == 0
    assert len(use.copies) == shape.num_layers
