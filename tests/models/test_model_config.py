"""Published config.json files are read; fields that would change the computation are refused by name."""

import json
from pathlib import Path

import pytest

from slora_jax.errors import CheckpointError, UnsupportedModelError
from slora_jax.models import ModelConfig, RopeConfig
from slora_jax.models.config import model_names

CONFIGS = json.loads((Path(__file__).parent / "published_configs.json").read_text())
LLAMA_2_7B = CONFIGS["LLAMA_2_7B"]
LLAMA_3_8B = CONFIGS["LLAMA_3_8B"]
LLAMA_3_1_8B = CONFIGS["LLAMA_3_1_8B"]
MISTRAL_7B_V01 = CONFIGS["MISTRAL_7B_V01"]
MISTRAL_7B_V02 = CONFIGS["MISTRAL_7B_V02"]
MISTRAL_7B_V03 = CONFIGS["MISTRAL_7B_V03"]
QWEN2_7B = CONFIGS["QWEN2_7B"]
QWEN3_8B = CONFIGS["QWEN3_8B"]
# (config, q_width, kv_width, tied, qkv_bias, qk_norm)
ACCEPTED = {
    "Llama-2-7b": (LLAMA_2_7B, 4096, 4096, False, False, None),
    "Llama-3-8B": (LLAMA_3_8B, 4096, 1024, False, False, None),
    "Llama-3.1-8B": (LLAMA_3_1_8B, 4096, 1024, False, False, None),
    "Llama-3.2-1B": (CONFIGS["LLAMA_3_2_1B"], 2048, 512, True, False, None),
    "Mistral-7B-v0.2": (MISTRAL_7B_V02, 4096, 1024, False, False, None),
    "Mistral-7B-v0.3": (MISTRAL_7B_V03, 4096, 1024, False, False, None),
    "Qwen2-7B": (QWEN2_7B, 3584, 512, False, True, None),
    "Qwen2.5-0.5B": (CONFIGS["QWEN2_5_0_5B"], 896, 128, True, True, None),
    "Qwen3-8B": (QWEN3_8B, 4096, 1024, False, False, "head"),
    "Qwen3-0.6B": (CONFIGS["QWEN3_0_6B"], 2048, 1024, True, False, "head"),
}


@pytest.mark.parametrize("name", ACCEPTED)
def test_published_configs_are_read(name):
    hf_config, q_width, kv_width, tied, qkv_bias, qk_norm = ACCEPTED[name]
    config = ModelConfig.from_dict(hf_config)
    assert (config.q_width, config.kv_width, config.tie_word_embeddings) == (q_width, kv_width, tied)
    assert (config.qkv_bias, config.o_bias, config.mlp_bias, config.qk_norm) == (qkv_bias, False, False, qk_norm)
    assert config.num_layers == hf_config["num_hidden_layers"]
    assert config.max_position_embeddings == hf_config["max_position_embeddings"]
    assert config.rope.theta == hf_config.get("rope_theta", 10000.0)
    hash(config)


def test_rope_is_read_from_either_generation_of_transformers():
    expected = RopeConfig(500000.0, "llama3", 8.0, 1.0, 4.0, 8192)
    assert ModelConfig.from_dict(LLAMA_3_1_8B).rope == expected
    modern = {field: value for field, value in LLAMA_3_1_8B.items() if field not in ("rope_theta", "rope_scaling")}
    modern["rope_parameters"] = {**LLAMA_3_1_8B["rope_scaling"], "rope_theta": 500000.0}
    assert ModelConfig.from_dict(modern).rope == expected
    linear = {**LLAMA_2_7B, "rope_scaling": {"type": "linear", "factor": 2.0}}
    assert ModelConfig.from_dict(linear).rope == RopeConfig(10000.0, "linear", 2.0)


def test_biases_of_llama_are_honoured():
    config = ModelConfig.from_dict({**LLAMA_3_1_8B, "attention_bias": True, "mlp_bias": True})
    assert (config.qkv_bias, config.o_bias, config.mlp_bias) == (True, True, True)


@pytest.mark.parametrize(
    "change",
    [
        {"sliding_window": 32768},
        {"sliding_window": 65536},
        {"sliding_window": 4096, "max_position_embeddings": 4096},
    ],
)
def test_window_as_long_as_the_model_is_full_attention(change):
    assert ModelConfig.from_dict({**MISTRAL_7B_V01, **change}).sliding_window is None


def test_mistrals_window_is_kept_whether_written_or_implied():
    assert ModelConfig.from_dict(MISTRAL_7B_V01).sliding_window == 4096
    implied = {field: value for field, value in MISTRAL_7B_V01.items() if field != "sliding_window"}
    assert ModelConfig.from_dict(implied).sliding_window == 4096
    assert ModelConfig.from_dict(MISTRAL_7B_V02).sliding_window is None


def test_qwens_window_is_that_of_the_upper_layers_if_it_is_on():
    on = {"use_sliding_window": True, "sliding_window": 4096, "max_window_layers": 26}
    kinds = ModelConfig.from_dict({**QWEN2_7B, **on}).kinds
    assert [kind.window for kind in kinds] == [None] * 26 + [4096] * 2
    kinds = ModelConfig.from_dict({**QWEN2_7B, **on, "layer_types": ["full_attention", "sliding_attention"] * 14}).kinds
    assert [kind.window for kind in kinds] == [None, 4096] * 14
    assert ModelConfig.from_dict({**QWEN2_7B, **on, "use_sliding_window": False}).sliding_window is None


def of_family(name: str, **fields: object) -> dict[str, object]:
    """A config.json with small sizes."""
    sizes = {"vocab_size": 64, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 4, "head_dim": 16}
    sizes["num_key_value_heads"] = 4
    return {"model_type": name, **sizes, "num_attention_heads": 4, **fields}


REFUSED = {
    "gemma 2 activation": (of_family("gemma2"), {"hidden_activation": "gelu"}, "hidden_activation='gelu'.*tanh"),
    "gemma 3 both ways": (of_family("gemma3_text"), {"use_bidirectional_attention": True}, "use_bidirectional_att"),
    "gemma 3 layer kind": (of_family("gemma3_text"), {"layer_types": ["chunked_attention"] * 4}, "layer_types"),
    "gemma 3 without text": (of_family("gemma3"), {}, "text_config=None"),
    "phi-3 rope": (of_family("phi3"), {"rope_scaling": {"type": "linear", "factor": 2.0}}, "rope_type='linear'"),
    "phi-3 longrope": (of_family("phi3"), {"rope_scaling": {"type": "su"}}, "short_factor"),
    "smollm3 layers": (of_family("smollm3"), {"no_rope_layers": [1, 0]}, "no_rope_layers=.*each of the 4 layers"),
    "granite scale": (of_family("granite"), {"attention_multiplier": 0}, "attention_multiplier=0"),
    "glm-4 share": (of_family("glm4"), {"partial_rotary_factor": 2.0}, "partial_rotary_factor=2.0"),
    "too few experts": (of_family("mixtral"), {"num_experts_per_tok": 9}, "num_experts_per_tok=9.*at most"),
    "llama window": (LLAMA_3_8B, {"use_sliding_window": True}, "use_sliding_window=True"),
    "activation": (LLAMA_3_8B, {"hidden_act": "gelu"}, "hidden_act='gelu'.*'silu'"),
    "quantization": (LLAMA_3_8B, {"quantization_config": {"bits": 4}}, "quantization_config"),
    "su": (QWEN3_8B, {"rope_scaling": {"rope_type": "su", "factor": 4.0}}, "rope_type='su'.*llama3"),
    "longrope of another width": (
        LLAMA_2_7B,
        {"rope_scaling": {"type": "longrope", "short_factor": [1.0], "long_factor": [1.0]}},
        "short_factor=.*64 positive numbers",
    ),
    "llama3 incomplete": (LLAMA_3_8B, {"rope_scaling": {"rope_type": "llama3", "factor": 8.0}}, "low_freq_factor"),
    "linear without factor": (LLAMA_3_8B, {"rope_scaling": {"type": "linear"}}, "factor"),
    "rope extra": (LLAMA_3_8B, {"rope_scaling": {"type": "linear", "factor": 2.0, "beta": 1}}, "beta"),
    "rope per layer type": (QWEN3_8B, {"rope_parameters": {"full_attention": {}}}, "full_attention"),
    "two thetas": (LLAMA_3_8B, {"rope_parameters": {"rope_theta": 1e4}}, "rope_theta"),
    "two rope types": (LLAMA_3_8B, {"rope_scaling": {"type": "linear", "rope_type": "default"}}, "rope_type"),
    "partial rotary": (LLAMA_3_8B, {"partial_rotary_factor": 0.5}, "partial_rotary_factor=0.5"),
    "partial rotary in rope": (
        LLAMA_3_8B,
        {"rope_parameters": {"partial_rotary_factor": 0.5}},
        "partial_rotary_factor=0.5",
    ),
    "layer types": (QWEN3_8B, {"layer_types": ["sliding_attention"] * 36}, "layer_types"),
    "too few layer types": (QWEN3_8B, {"layer_types": ["full_attention"] * 35}, "layer_types"),
    "unknown type": (MISTRAL_7B_V03, {"model_type": "gpt_oss"}, "model_type='gpt_oss'.*mistral"),
    "another type's class": (MISTRAL_7B_V03, {"model_type": "mixtral"}, "architectures"),
    "no model type": (LLAMA_3_8B, {"model_type": ...}, "model_type=None"),
    "classifier head": (LLAMA_3_8B, {"architectures": ["LlamaForSequenceClassification"]}, "architectures"),
    "remote code": (LLAMA_3_8B, {"auto_map": {"AutoModelForCausalLM": "modeling.Model"}}, "auto_map"),
    "bias on mistral": (MISTRAL_7B_V03, {"attention_bias": True}, "attention_bias=True"),
    "soft-capping": (LLAMA_3_8B, {"final_logit_softcapping": 30.0}, "final_logit_softcapping=30.0.*null"),
    "multiplier": (LLAMA_3_8B, {"embedding_multiplier": 12.0}, "embedding_multiplier=12.0.*null or 1"),
    "multiplier of nothing": (LLAMA_3_8B, {"residual_multiplier": 0}, "residual_multiplier=0"),
    "attention's scale": (LLAMA_3_8B, {"attention_multiplier": 1.0}, "attention_multiplier=1.0.*null"),
    "another activation": (LLAMA_3_8B, {"hidden_activation": "gelu_pytorch_tanh"}, "hidden_activation"),
    "experts": (MISTRAL_7B_V03, {"num_local_experts": 8}, "num_local_experts=8"),
    "layers without positions": (LLAMA_3_8B, {"no_rope_layers": [1, 1, 1, 0]}, "no_rope_layers"),
    "norm of queries": (LLAMA_3_8B, {"use_qk_norm": True}, "use_qk_norm=True"),
    "norm of another type": (LLAMA_3_8B, {"norm_type": "layer_norm"}, "norm_type='layer_norm'.*'rms_norm'"),
    "layer norm": (LLAMA_3_8B, {"layer_norm_eps": 1e-5}, "layer_norm_eps"),
    "bias of queries": (LLAMA_3_8B, {"qkv_bias": True}, "qkv_bias=True"),
    "unheard-of multiplier": (LLAMA_3_8B, {"mup_width_multiplier": 8.0}, "mup_width_multiplier=8.0"),
    "unheard-of positions": (LLAMA_3_8B, {"use_rotary_offset": True}, "use_rotary_offset=True"),
    "no hidden size": (LLAMA_3_8B, {"hidden_size": ...}, "hidden_size=None"),
    "heads do not group": (LLAMA_3_8B, {"num_key_value_heads": 5}, "num_key_value_heads=5"),
    "negative": (LLAMA_3_8B, {"vocab_size": -1}, "vocab_size=-1"),
    "text for a number": (LLAMA_3_8B, {"rms_norm_eps": "small"}, "rms_norm_eps='small'"),
    "text for a switch": (LLAMA_3_8B, {"tie_word_embeddings": "no"}, "tie_word_embeddings='no'"),
    "eos": (LLAMA_3_8B, {"eos_token_id": "</s>"}, "eos_token_id"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refusals_name_field_and_value(case):
    base, change, message = REFUSED[case]
    hf_config = {field: value for field, value in {**base, **change}.items() if value is not ...}
    with pytest.raises(UnsupportedModelError, match=message):
        ModelConfig.from_dict(hf_config)


@pytest.mark.parametrize("inactive", [None, False, 0, 0.0, "", [], {}])
def test_inactive_fields_are_ignored_without_a_warning(inactive, recwarn):
    ModelConfig.from_dict({**LLAMA_3_8B, "num_experts": inactive, "use_alibi": inactive, "unheard_of": inactive})
    assert not recwarn.list


def test_unknown_fields_are_named_in_one_warning(recwarn):
    known = ModelConfig.from_dict(LLAMA_3_8B)
    assert not recwarn.list
    assert ModelConfig.from_dict({**LLAMA_3_8B, "training_corpus": "web", "logo": [1]}) == known
    [warning] = recwarn.list
    assert "config.json: training_corpus, logo: not known" in str(warning.message)


def test_neutral_factors_and_implied_switches_are_accepted(recwarn):
    ModelConfig.from_dict({**LLAMA_3_8B, "embedding_multiplier": 1.0, "logits_scaling": 1, "norm_type": "rmsnorm"})
    ModelConfig.from_dict({**QWEN2_7B, "use_qkv_bias": True})
    ModelConfig.from_dict({**QWEN3_8B, "use_qk_norm": True})
    assert not recwarn.list


def test_smollm2_is_read_without_a_warning(recwarn):
    config = ModelConfig.from_dict(CONFIGS["SMOLLM2_135M"])
    assert (config.num_layers, config.num_heads, config.num_kv_heads, config.head_dim) == (30, 9, 3, 64)
    assert config.rope == RopeConfig(100000.0)
    assert not recwarn.list


def test_generation_config_names_the_end_of_sequence_first(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(LLAMA_3_8B))
    assert ModelConfig.from_directory(tmp_path).eos_token_ids == (128001,)
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": [128001, 128009]}))
    assert ModelConfig.from_directory(tmp_path).eos_token_ids == (128001, 128009)
    (tmp_path / "generation_config.json").write_text(json.dumps({"do_sample": True}))
    assert ModelConfig.from_directory(tmp_path).eos_token_ids == (128001,)
    (tmp_path / "config.json").write_text(json.dumps({**LLAMA_3_8B, "eos_token_id": None}))
    assert ModelConfig.from_directory(tmp_path).eos_token_ids == ()


@pytest.mark.parametrize(
    ("path", "fields", "names"),
    [
        ("Tiny-Llama", {}, {"tiny-llama"}),
        ("local", {"_name_or_path": "org/Tiny-Llama/"}, {"local", "tiny-llama"}),
        ("hub/models--org--Tiny-Llama/snapshots/0a1b", {}, {"tiny-llama"}),
        ("Tiny-Llama-Q4_K_M.gguf", None, {"tiny-llama"}),
        ("Tiny-Llama.f16.gguf", None, {"tiny-llama"}),
    ],
)
def test_names_of_a_model_are_those_of_its_files(tmp_path, path, fields, names):
    if fields is not None:
        (tmp_path / path).mkdir(parents=True)
        (tmp_path / path / "config.json").write_text(json.dumps(fields))
    assert model_names(tmp_path / path) == names


def test_an_unreadable_config_file_is_a_checkpoint_error(tmp_path):
    with pytest.raises(CheckpointError, match="config.json: no such file"):
        ModelConfig.from_directory(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(CheckpointError, match="config.json: cannot be read as JSON"):
        ModelConfig.from_directory(tmp_path)
    (tmp_path / "config.json").write_text("[]")
    with pytest.raises(CheckpointError, match="expected a JSON object"):
        ModelConfig.from_directory(tmp_path)
