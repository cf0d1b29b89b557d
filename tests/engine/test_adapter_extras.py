"""Adapters that are more than plain LoRA, against PEFT: mixed with plain ones, chunked, preempted, reloaded."""

from dataclasses import replace

import numpy as np
import pytest

from slora_jax import Engine, SamplingParams
from slora_jax.adapters import AdapterStore, BaseGeometry
from slora_jax.errors import AdapterError, ConfigError

torch = pytest.importorskip("torch")
peft = pytest.importorskip("peft")
from peft_families import CONFIG, NEW_TOKENS, VOCAB, SeparateAdapters, Served, assert_close  # noqa: E402

KINDS = {
    "plain": {"r": 8, "lora_alpha": 16, "target_modules": "all-linear"},
    "dora": {"r": 8, "lora_alpha": 16, "target_modules": "all-linear", "use_dora": True},
    "dora of one layer": {
        "r": 3,
        "use_dora": True,
        "use_rslora": True,
        "target_modules": ["k_proj", "down_proj"],
        "layers_to_transform": [1],
    },
    "biases of B": {"r": 5, "lora_alpha": 9, "target_modules": ["q_proj", "v_proj", "up_proj"], "lora_bias": True},
    "all biases": {"r": 4, "target_modules": ["o_proj"], "bias": "all"},
    "dora and biases": {"r": 17, "target_modules": ["q_proj", "gate_proj"], "use_dora": True, "bias": "lora_only"},
    "head": {"r": 6, "target_modules": ["q_proj", "lm_head"]},
    "embedding": {"r": 20, "lora_alpha": 30, "target_modules": ["embed_tokens"]},
    "head and embedding": {"r": 4, "target_modules": ["lm_head", "embed_tokens", "down_proj"], "use_rslora": True},
    "trained tokens": {"r": 4, "target_modules": ["v_proj"], "trainable_token_indices": [*range(0, 500, 25)]},
    "saved modules": {"r": 4, "target_modules": ["v_proj"], "modules_to_save": ["embed_tokens", "lm_head"]},
}
ENDS = ("head", "embedding", "head and embedding", "trained tokens", "saved modules")
LENGTHS = (1, 300, 17, 129, 16, 33, 100, 5, 78, 31, 210, 64, 12)


@pytest.fixture(scope="module")
def family(tmp_path_factory):
    base = "llama", {"attention_bias": True, "mlp_bias": True}
    return SeparateAdapters(tmp_path_factory.mktemp("extras"), *base, KINDS, LENGTHS)


@pytest.fixture(scope="module")
def served(family):
    with Engine.from_pretrained(family.model_dir, replace(CONFIG, num_pages=60, adapter_extras=True)) as engine:
        for name in KINDS:
            info = engine.load_adapter(name, family.adapter_dir / name)
            assert (info.extras == ()) == (name == "plain")
        yield Served(family, engine)


def test_mixed_batch_matches_peft_under_preemption(served):
    outputs = served.mixed_batch
    served.family.check(outputs)
    assert served.engine.stats().preemptions > 0, "the pool is too large to force preemption"
    assert np.median([len(set(output.token_ids)) for output in outputs]) > NEW_TOKENS // 4
    served.engine.check()


def test_matches_peft_after_eviction_and_reload(served):
    before = served.engine.stats()
    for name in KINDS:  # beside a long prompt that evicts idle ones
        served.engine.generate([served.family.prompts[1], [1, 2]], SamplingParams(max_tokens=2), [None, name])
    served.family.check(served.run(np.arange(len(LENGTHS))[::-1], max_tokens=16))
    assert served.engine.stats().adapter_evictions - before.adapter_evictions >= len(KINDS)


def test_trained_tokens_change_a_tied_head_too(tmp_path):
    """One token of each: decode steps end in the same program of logits."""
    kinds = {name: KINDS[name] for name in ("trained tokens", "head")}
    lengths = (20, 90, 31, 5, 64, 130)
    family = SeparateAdapters(tmp_path, "llama", {"tie_word_embeddings": True}, kinds, lengths)
    with Engine.from_pretrained(family.model_dir, replace(CONFIG, num_pages=60, adapter_extras=True)) as engine:
        for name in kinds:
            engine.load_adapter(name, family.adapter_dir / name)
        for output in Served(family, engine).run(np.arange(len(lengths)), max_tokens=1):
            assert_close(output, family.logits(output.adapter, output.prompt_token_ids)[-1:])


def test_four_devices_match_peft_and_refuse_changes_of_head_and_embedding(family):
    """Two KV heads, each on two devices. One step with every kind: decode steps run the same operations."""
    config = replace(CONFIG, num_pages=300, adapter_extras=True, tensor_parallel_size=4)
    kinds = [name for name in KINDS if name not in ENDS]
    prompts = np.random.default_rng(3).integers(0, VOCAB, (len(kinds) + 1, 9)).tolist()
    with Engine.from_pretrained(family.model_dir, config) as engine:
        for name in ENDS:
            with pytest.raises(AdapterError, match="lm_head or embed_tokens, which needs .*tensor_parallel_size=1"):
                engine.load_adapter(name, family.adapter_dir / name)
        for name in kinds:
            engine.load_adapter(name, family.adapter_dir / name)
        outputs = engine.generate(prompts, SamplingParams(max_tokens=1), [*kinds, None])
    for output in outputs:
        logits = family.logits(output.adapter, output.prompt_token_ids)[-1:]
        assert_close(output, logits)
        assert output.token_ids == logits.argmax(-1).tolist()


def test_several_processes_refuse_them_by_name(family):
    with pytest.raises(ConfigError, match="adapter_extras=True: must be False over several processes"):
        Engine.from_pretrained(family.model_dir, replace(CONFIG, adapter_extras=True), processes=object())


def test_only_steps_with_vectors_run_the_program_for_them(served, monkeypatch):
    engine, run = served.engine, []
    device = engine.executor.device
    step = device.step
    monkeypatch.setattr(device, "step", lambda key, *rest: (run.append(key[1]), step(key, *rest))[1])
    for adapter, expected in ((None, False), ("plain", True), ("dora", "extras")):
        run.clear()
        engine.generate([[1, 2, 3]], SamplingParams(max_tokens=3), adapter)
        programs = device.spec.lora_programs(device.spec.layout(CONFIG.buckets()[0]))
        assert {programs[number] for number in run} == {expected}


def test_adapter_with_vectors_is_refused_by_name_where_they_are_not_served(family):
    geometry = BaseGeometry(2, 64, 128, 32, 112, 16, vocab_size=VOCAB)
    with AdapterStore(geometry, "float32", 10**9) as store:
        store.prepare("plain", family.adapter_dir / "plain")
        for name in KINDS.keys() - {"plain", "saved modules"}:
            reason = f"adapter '{name}' has DoRA, .*, which need EngineConfig.adapter_extras=True, found False"
            with pytest.raises(AdapterError, match=reason):
                store.prepare(name, family.adapter_dir / name)


def test_trained_bias_is_refused_where_the_base_model_has_none(family):
    geometry = BaseGeometry(2, 64, 128, 32, 112, 16, vocab_size=VOCAB)
    store = AdapterStore(geometry, "float32", 10**9, base=WithoutBiases(), extras=True)
    reason = r"bias: .* trained bias of model.layers.0.mlp.down_proj, .* has none"
    with store, pytest.raises(AdapterError, match=reason):
        store.prepare("x", family.adapter_dir / "all biases")


class WithoutBiases:
    """A base model without biases."""

    def bias(self, layer, projection):
        return None
