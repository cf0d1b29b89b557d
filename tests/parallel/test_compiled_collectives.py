"""Programs for tensor-parallel groups of absent GPUs have the paper's collectives, to the byte, and no others.

Two programs are compiled, which shows that compiling adds no collective. The others are only traced.
"""

from collections import Counter

import jax
import jax.extend.core
import jax.numpy as jnp
import pytest

from pallas_kernels.devices import compiling_for
from pallas_kernels.targets import TARGETS, compile_for, deviceless_mesh
from slora_jax.analysis import collectives_in, pool_use
from slora_jax.analysis.hlo import instructions
from slora_jax.engine import EngineConfig
from slora_jax.engine.after_step import make_sampler, sampler_shapes
from slora_jax.engine.sizing import pool_shape, step_spec
from slora_jax.engine.step import make_step, step_shapes
from slora_jax.models import ModelConfig
from slora_jax.models.init import abstract_shards
from slora_jax.parallel.cost import base_messages, lora_messages, vocabulary_messages
from slora_jax.parallel.layout import LORA_SHARDINGS
from slora_jax.parallel.mesh import TensorParallel, cut

LAYERS, HIDDEN, ROWS, SEQS = 2, 1024, 64, 16
RANK = 21  # no degree divides it
MODEL = ModelConfig.from_dict(
    {
        "model_type": "llama",
        "hidden_size": HIDDEN,
        "intermediate_size": 2048,
        "num_attention_heads": 16,
        "num_key_value_heads": 8,
        "num_hidden_layers": LAYERS,
        "vocab_size": 1003,
        "max_position_embeddings": 256,
    }
)
CONFIG = EngineConfig(
    dtype="bfloat16",
    num_pages=3000,
    max_num_seqs=SEQS,
    max_num_batched_tokens=ROWS,
    max_lora_rank=RANK,
    decode_buckets=(SEQS,),
    mixed_buckets=(ROWS,),
)
DECODE, MIXED = CONFIG.buckets()


def spec_of(target, count, lora="slora"):
    parallel = TensorParallel(cut(MODEL, count, lora), deviceless_mesh(TARGETS[target], count))
    return step_spec(
        MODEL, *abstract_shards(MODEL, CONFIG.dtype, parallel), CONFIG, pool_shape(MODEL, CONFIG), parallel
    )


def compiled_step(target, spec, bucket):
    with compiling_for(TARGETS[target].device):
        layout = spec.layout(bucket)
        return compile_for(TARGETS[target], make_step(spec, layout, with_lora=True), *step_shapes(spec, layout))


def counted(compiled) -> Counter:
    found = Counter()
    for collective in collectives_in(compiled):
        found[collective.kind, collective.bytes] += collective.count
    return found


def traced(spec, bucket, with_lora=True) -> Counter:
    """The collectives of a step's trace for the CPU, which are the same as for a GPU."""
    layout = spec.layout(bucket)
    found = Counter()

    def walk(jaxpr):
        for equation in jaxpr.eqns:
            kind = {"psum": "all-reduce", "all_gather": "all-gather"}.get(equation.primitive.name)
            if kind:
                found[kind, sum(out.aval.size * out.aval.dtype.itemsize for out in equation.outvars)] += 1
            for inner in jax.extend.core.jaxprs_in_params(equation.params):
                walk(inner)

    walk(make_step(spec, layout, with_lora).trace(*step_shapes(spec, layout)).jaxpr)
    return found


def expected(shards, rows, seqs, with_lora=True) -> Counter:
    itemsize = jnp.dtype(CONFIG.dtype).itemsize
    layer = base_messages(HIDDEN, rows, itemsize) + (lora_messages(shards, rows, RANK, itemsize) if with_lora else [])
    messages = layer * LAYERS + vocabulary_messages(HIDDEN, shards, rows, seqs, itemsize)
    return Counter((message.kind, message.bytes) for message in messages)


def test_the_step_holds_the_papers_collectives_to_the_byte():
    target, count, bucket = "h200", 8, MIXED
    spec = spec_of(target, count)
    compiled = compiled_step(target, spec, bucket)
    assert counted(compiled) == traced(spec, bucket) == expected(spec.shards, bucket.tokens, bucket.seqs)
    rounded = -(-RANK // count) * count
    assert counted(compiled)["all-gather", bucket.tokens * 3 * rounded * 2] == LAYERS

    purposes = Counter()
    for collective in collectives_in(compiled):
        purposes[collective.kind, collective.purpose] += collective.count
    assert purposes == {
        ("all-reduce", "base"): 2 * LAYERS,
        ("all-reduce", "lora"): 2 * LAYERS,
        ("all-gather", "lora"): 2 * LAYERS,
        ("all-reduce", "embedding"): 1,
        ("all-gather", "greedy"): 1,
    }

    use = pool_use(compiled, spec.shard_pool)
    assert use.copies == ()
    assert use.aliased_bytes >= use.pool_bytes
    opcodes = {instruction.opcode for instruction in instructions(compiled.as_text())}
    assert not {"all-to-all", "collective-permute", "send", "recv"} & opcodes


@pytest.mark.parametrize("count", [2, 4, 8])
def test_the_messages_follow_the_published_formula(count):
    """5 (N - 1) B r / N beside 2 (N - 1) B h / N of attention, 4 and 2 more of the feed-forward."""
    n, b, r = count, ROWS, 24
    lora = lora_messages(cut(MODEL, count), ROWS, r, itemsize=2)
    base = base_messages(HIDDEN, ROWS, itemsize=2)
    assert sum(m.sent(n) for m in lora[:2]) == 2 * 5 * (n - 1) * b * r / n
    assert sum(m.sent(n) for m in lora[2:]) == 2 * 4 * (n - 1) * b * r / n
    assert base[0].sent(n) == 2 * 2 * (n - 1) * b * HIDDEN / n
    assert len(base) == 2
    sharded_in = lora_messages(cut(MODEL, count, "sharded_in"), ROWS, r, itemsize=2)
    assert sum(m.sent(n) for m in sharded_in) == 2 * 14 * (n - 1) * b * r / n
    assert lora_messages(cut(MODEL, count, "replicated"), ROWS, r, itemsize=2) == []


@pytest.mark.parametrize("bucket", [DECODE, MIXED], ids=["decode", "mixed"])
@pytest.mark.parametrize("lora", LORA_SHARDINGS)
def test_every_layout_traces_the_collectives_of_its_formula(lora, bucket):
    spec = spec_of("h200", 4, lora)
    assert traced(spec, bucket) == expected(spec.shards, bucket.tokens, bucket.seqs)


def test_a_step_without_adapters_has_the_base_collectives_only():
    spec = spec_of("h200", 4)
    assert traced(spec, DECODE, with_lora=False) == expected(spec.shards, SEQS, SEQS, with_lora=False)


def test_the_sampler_gathers_the_logits_once():
    spec = spec_of("h200", 4)
    compiled = compile_for(TARGETS["h200"], make_sampler(spec, SEQS), *sampler_shapes(spec, SEQS))
    assert counted(compiled) == Counter({("all-gather", SEQS * 1004 * 4): 1})
