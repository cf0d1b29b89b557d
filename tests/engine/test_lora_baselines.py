"""Baselines that are settings of the engine (`lora="bmm"`, `"merge"`, `"off"`): they give the paged engine's tokens."""

import math
from collections.abc import Callable, Iterator
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.lora.layout import PROJECTIONS
from slora_jax import AdapterError, ConfigError, Engine, RequestOutput, SamplingParams
from slora_jax.adapters import random_adapter, write_peft
from slora_jax.adapters.tiles import pack_tiles
from slora_jax.analysis import pool_use
from slora_jax.analysis.hlo import instructions
from slora_jax.engine.merge import AdapterMerge, MergeProgram, kernels
from slora_jax.engine.sizing import pool_shape, step_spec
from slora_jax.engine.step_spec import StepSpec
from slora_jax.memory import PageKind, Resident, upload_adapter
from slora_jax.metrics import Counters
from slora_jax.scheduling import AdapterUse, Fcfs, OneAdapter, Request, RequestMetrics, ScheduledSequence, StepPlan

NUM_ADAPTERS = 12


def adapters(geometry) -> dict:
    """Adapters of mixed ranks and targets, by name. The pool has room for about half of them."""
    made = {}
    for seed in range(NUM_ADAPTERS):
        rng = np.random.default_rng(seed)
        targets = rng.choice(PROJECTIONS, rng.integers(1, 6), replace=False).tolist()
        made[f"adapter-{seed}"] = random_adapter(
            geometry, {p: int(rng.choice([1, 3, 8, 16])) for p in targets}, seed=seed
        )
    return made


@pytest.fixture(scope="module")
def baseline(tiny) -> Iterator[Callable[[str], Engine]]:
    """Returns the engine of one `EngineConfig.lora` with all adapters, made at its first use."""
    engines: dict[str, Engine] = {}

    def of(lora: str) -> Engine:
        if lora not in engines:
            params = jax.tree.map(jnp.copy, tiny.params)  # merging changes them in place
            settings = tiny.settings(lora=lora, compile_ahead=lora != "off")
            engines[lora] = Engine(tiny.config, tiny.graphdef, params, settings)
            for name, adapter in adapters(tiny.geometry).items():
                engines[lora].load_adapter(name, adapter)
        return engines[lora]

    yield of
    for engine in engines.values():
        engine.close()


def churn(engine: Engine, rng: np.random.Generator) -> dict[str, RequestOutput]:
    """Runs sixty greedy requests for all adapters and the base model, in bursts; cancels some. Request id -> output."""
    outputs: dict[str, RequestOutput] = {}
    for number in range(60):
        name = None if rng.random() < 0.15 else f"adapter-{rng.integers(NUM_ADAPTERS)}"
        prompt = rng.integers(2, 320, rng.choice([1, 2, 7, 8, 9, 30])).tolist()
        params = SamplingParams(max_tokens=int(rng.choice([1, 4, 25])), ignore_eos=True)
        engine.add_request(prompt, params, name, request_id=f"{number}")
        for _ in range(rng.poisson(2)):
            outputs |= {d.request_id: d.output for d in engine.step() if d.output is not None}
        if rng.random() < 0.1:
            engine.cancel(f"{rng.integers(number + 1)}")
    while engine.has_work():
        outputs |= {d.request_id: d.output for d in engine.step() if d.output is not None}
    engine.check()
    assert len(outputs) == 60
    return outputs


@pytest.mark.parametrize("lora", ["bmm", "merge"])
def test_tokens_under_churn_are_those_of_merged_weights_and_nothing_compiles(
    baseline, tiny, lora, greedy_margin, compilations, rng
):
    engine = baseline(lora)
    churn(engine, np.random.default_rng(0))
    compilations.clear()
    before = engine.stats()
    outputs = churn(engine, rng)
    assert not compilations, f"{len(compilations)} programs were compiled after warm-up"
    weights = adapters(tiny.geometry)
    answered = [output for output in outputs.values() if output.token_ids]
    assert len(answered) > 50 and {output.adapter for output in answered} == {None, *weights}
    for output in answered:
        margin = greedy_margin(output.prompt_token_ids, output.token_ids, weights.get(output.adapter))
        assert margin < 1e-5, (output.request_id, output.adapter)
    after = engine.stats()
    assert after.adapter_evictions > before.adapter_evictions, "the pool is too large to force evictions"
    assert (after.adapter_merges > before.adapter_merges) == (lora == "merge")


def test_requests_of_many_adapters_at_once_get_the_paged_engines_tokens(baseline):
    names = [None, *(f"adapter-{i}" for i in range(NUM_ADAPTERS))]
    prompts = [[5 + i, 9, 3 * i + 7] * (1 + i % 4) for i in range(len(names))]
    params = SamplingParams(max_tokens=20, ignore_eos=True)
    tokens = {
        lora: [o.token_ids for o in baseline(lora).generate(prompts, params, names)]
        for lora in ("paged", "bmm", "merge")
    }
    assert tokens["bmm"] == tokens["paged"] and tokens["merge"] == tokens["paged"]
    assert len(set(map(tuple, tokens["paged"]))) == len(names)


def test_a_padded_step_writes_the_pool_in_place(baseline):
    device = baseline("bmm").executor.device
    programs = {program.name: program.compiled for program in device.programs.programs}
    layers = {name: compiled for name, compiled in programs.items() if "lora" in name and name.endswith("_layer")}
    assert len(layers) > 3 and "decode_4_lora_4x1_layer" in layers and "mixed_16_lora_5x16_layer" in layers
    for name, compiled in layers.items():
        use = pool_use(compiled, replace(device.spec.pool, num_layers=1))
        assert use.aliased_bytes >= use.pool_bytes and use.copies == (), name


# Merge


def test_one_merge_per_change_of_adapter(baseline):
    engine = baseline("merge")
    params = SamplingParams(max_tokens=3, ignore_eos=True)
    engine.generate([[1]], params, [None])
    before = engine.stats().adapter_merges
    for names, merges in (
        (["adapter-0"] * 3, 1),
        (["adapter-0"], 0),  # still merged
        ([None], 0),  # unmerged
        (["adapter-0", "adapter-1", None, "adapter-0", "adapter-1"], 2),  # requests of one adapter run together
        (["adapter-1", "adapter-0"], 2),
    ):
        engine.generate([[7, 8]] * len(names), params, names)
        after = engine.stats().adapter_merges
        assert after - before == merges, names
        before = after


def test_merged_adapter_can_be_evicted_for_the_next_one(baseline, tiny, squeeze, greedy_margin):
    """The pool has room for one adapter and a sequence, so the next adapter reuses the pages of the last one."""
    engine, weights = baseline("merge"), adapters(tiny.geometry)
    pages = {info.name: info.num_pages for info in engine.adapters()}
    largest = sorted(pages, key=pages.__getitem__)[-3:]
    with squeeze(engine, pages[largest[-1]] + 3):
        for name in [*largest, None] * 2:
            (output,) = engine.generate([[21, 22, 23]], SamplingParams(max_tokens=20, ignore_eos=True), name)
            assert greedy_margin(output.prompt_token_ids, output.token_ids, weights.get(name)) < 1e-5, name
            assert len(engine.residency) == 1


def test_a_policy_that_may_mix_adapters_is_refused(tiny):
    settings = tiny.settings(lora="merge")
    with pytest.raises(ConfigError, match="lora='merge'.*the policy Fcfs may mix them; use OneAdapter"):
        Engine(tiny.config, tiny.graphdef, tiny.params, settings, policy=Fcfs())


def test_a_step_that_mixes_adapters_is_never_run_on_merged_weights(baseline):
    engine = baseline("merge")
    engine.scheduler.policy = Fcfs()
    try:
        with pytest.raises(AssertionError, match="several adapters"):
            engine.generate([[7], [8]], SamplingParams(max_tokens=3), ["adapter-0", None])
    finally:
        engine.scheduler.policy = OneAdapter()


def merge_spec(tiny, dtype: str) -> StepSpec:
    config = tiny.settings(lora="merge", dtype=dtype)
    struct = jax.tree.map(lambda p: jax.ShapeDtypeStruct(p.shape, jnp.dtype(dtype)), tiny.params)
    return step_spec(tiny.config, tiny.graphdef, struct, config, pool_shape(tiny.config, config))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_merge_program_changes_the_weights_in_place(tiny, dtype):
    spec = merge_spec(tiny, dtype)
    program = MergeProgram(spec).program
    weights = jax.tree.leaves(kernels(spec.params))
    nbytes = sum(math.prod(w.shape) * w.dtype.itemsize for w in weights)
    assert program.memory_analysis().alias_size_in_bytes >= nbytes
    whole = {w.shape for w in weights} | {spec.pool.pool_struct()[0].shape}
    names = {"float32": "f32", "bfloat16": "bf16"}
    types = {f"{names[dtype]}[{','.join(map(str, shape))}]" for shape in whole}
    copies = [
        i for i in instructions(program.as_text()) if i.opcode.startswith("copy") and i.type.split("{")[0] in types
    ]
    assert not copies, copies


@pytest.mark.parametrize(("dtype", "least", "most"), [("float32", 1e-8, 1e-6), ("bfloat16", 1e-3, 3e-2)])
def test_unmerging_leaves_a_rounding_error_behind(tiny, dtype, least, most):
    """Drift of the weights after 100 switches, relative to their norm. Measured: 5.5e-7 in float32, 2.3e-2 in bfloat16
    (one rounding of a bfloat16 weight is about 1.7e-3)."""
    spec = merge_spec(tiny, dtype)
    counters, program = Counters(), MergeProgram(spec)

    class Arrays:
        params = jax.tree.map(lambda p: jnp.array(p, dtype), tiny.params)
        pool, table = spec.pool.make_pool(), spec.pool.make_table()

        def merge(self, slot, sign):
            self.params = program(self.params, self.pool, self.table, slot, sign)

    device = Arrays()
    merge = AdapterMerge(device, counters)
    before = [np.asarray(k, np.float64) for k in jax.tree.leaves(kernels(device.params))]
    for number in range(100):
        tiles = pack_tiles(random_adapter(tiny.geometry, 8, seed=number % 4), tiny.geometry, dtype)
        pages = np.arange(1, 1 + tiles.num_pages, dtype=np.int32)
        resident = Resident(
            kind=PageKind.ADAPTER, num_pages=pages.size, digest=tiles.digest, slot=0, pages=pages, ranks=tiles.ranks
        )
        merge.before_upload(resident)
        device.pool, device.table = upload_adapter(
            device.pool, device.table, 0, resident.pages, resident.ranks, tiles.pages
        )
        merge.before_step(StepPlan([ScheduledSequence(request(0), 0, 1, True)]))
    merge.before_step(StepPlan([ScheduledSequence(request(-1), 0, 1, True)]))
    assert counters.adapter_merges == 100
    after = [np.asarray(k, np.float64) for k in jax.tree.leaves(kernels(device.params))]
    drift = max(np.linalg.norm(a - b) / np.linalg.norm(b) for a, b in zip(after, before, strict=True))
    print(f"drift {drift:.2e}")
    assert least < drift < most


def request(adapter_slot: int) -> Request:
    use = None if adapter_slot < 0 else AdapterUse("a", "digest", np.zeros(7, np.int32), 1)
    made = Request("r", 0, [1], SamplingParams(), 0, 1, use, RequestMetrics(0.0))
    made.adapter_slot = adapter_slot
    return made


def test_merged_weights_are_pefts(tiny, model_dir, tmp_path, baseline):
    torch = pytest.importorskip("torch")
    peft = pytest.importorskip("peft")
    from transformers import AutoModelForCausalLM

    name, adapter = next(iter(adapters(tiny.geometry).items()))
    write_peft(tmp_path / name, adapter)
    base = AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32)
    merged = peft.PeftModel.from_pretrained(base, str(tmp_path / name)).merge_and_unload().state_dict()
    prompt, params = [11, 12, 13], SamplingParams(max_tokens=30, ignore_eos=True)
    (output,) = baseline("merge").generate([prompt], params, name)
    layers = kernels(baseline("merge").executor.device.params)
    columns = {"qkv": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"), "o": ("self_attn.o_proj",)}
    columns |= {"gate_up": ("mlp.gate_proj", "mlp.up_proj"), "down": ("mlp.down_proj",)}
    for index, layer in enumerate(layers):
        for stack, modules in columns.items():
            theirs = np.concatenate([merged[f"model.layers.{index}.{m}.weight"].numpy().T for m in modules], axis=1)
            np.testing.assert_allclose(layer[stack], theirs, rtol=0, atol=1e-5)
    model = AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32)
    model.load_state_dict(merged)
    ids = model.generate(
        input_ids=torch.tensor([prompt]), attention_mask=torch.ones(1, 3, dtype=torch.long), max_new_tokens=30,
        min_new_tokens=30, do_sample=False, pad_token_id=0, eos_token_id=None,
    )  # fmt: skip
    assert ids[0, 3:].tolist() == output.token_ids


# Off


def test_lora_off_keeps_names_and_neither_loads_nor_computes_adapters(baseline, tiny):
    engine, params = baseline("off"), SamplingParams(max_tokens=12, ignore_eos=True)
    prompts = [[5, 6, 7], [8] * 11, [9]]
    names = ["adapter-0", None, "adapter-5"]
    outputs = engine.generate(prompts, params, names)
    expected = baseline("paged").generate(prompts, params, None)
    assert [o.token_ids for o in outputs] == [o.token_ids for o in expected]
    assert [o.adapter for o in outputs] == names
    stats = engine.stats()
    assert (stats.adapter_loads, stats.resident_adapters, stats.pages.adapter) == (0, 0, 0)
    assert not any("lora" in program.name for program in engine.executor.device.programs.programs)
    with pytest.raises(AdapterError, match="unknown adapter 'adapter-99'"):
        engine.add_request([1], params, "adapter-99")
