"""A GGUF file gives the weights and the config of the model that was written to it."""

import dataclasses
import shutil

import jax
import numpy as np
import pytest
import torch
import transformers
from gguf_files import K_QUANTS, QUANTISABLE, gguf_metadata, write_file, write_model

from slora_jax.errors import CheckpointError, UnsupportedModelError
from slora_jax.models import ModelConfig, load_model
from slora_jax.parallel.mesh import tensor_parallel

SHAPE = {"hidden_size": 64, "intermediate_size": 96}
WIDE = {"hidden_size": 256, "intermediate_size": 256}  # rows of K-quants have blocks of 256
MIXED = {"ffn_down": "Q4_1", "ffn_up": "Q5_0", "ffn_gate": "Q4_0", "attn_v": "F16", "attn_output": "BF16"}
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 500.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 24,
}
FAMILIES = {
    "llama": ("llama", {"num_key_value_heads": 2}),
    "llama-tied-mha": ("llama", {"num_key_value_heads": 4, "tie_word_embeddings": True}),
    "llama-wide-heads": ("llama", {"head_dim": 32}),
    "llama-biases": ("llama", {"attention_bias": True, "mlp_bias": True}),
    "llama-linear-rope": ("llama", {"rope_parameters": {"rope_type": "linear", "rope_theta": 1e3, "factor": 3.0}}),
    "mistral": ("mistral", {"sliding_window": None, "rms_norm_eps": 1e-5}),
    "qwen2": ("qwen2", {"rope_parameters": {"rope_type": "default", "rope_theta": 1e6}}),
    "qwen2-tied": ("qwen2", {"tie_word_embeddings": True}),
    "qwen3": ("qwen3", {"head_dim": 128}),
    "qwen3-biases": ("qwen3", {"head_dim": 32, "attention_bias": True}),
}


def mixed(name: str) -> str:
    return MIXED.get(name.split(".")[-2], "Q8_0")


def prompts() -> list[np.ndarray]:
    rng = np.random.default_rng(7)
    return [rng.integers(0, 96, length) for length in (48, 1, 17)]


def torch_logits(model: torch.nn.Module) -> np.ndarray:
    with torch.no_grad():
        return np.concatenate([model(torch.from_numpy(p)[None]).logits[0].numpy() for p in prompts()])


def assert_same_logits(file, expected, decoder_logits):
    graphdef, params, _ = load_model(file, "float32", progress=False)
    assert np.abs(expected).max() > 1.0
    found = decoder_logits(graphdef, params, prompts())
    assert np.abs(found - expected).max() <= 1e-4 * np.abs(expected).max()


def load_both(file, model, tmp_path, **written):
    """(params, config) of a GGUF file of the model, and of a Hugging Face directory with the weights of the file."""
    model.save_pretrained(tmp_path / "hf", state_dict=write_model(file, model, mixed, **written))
    return [load_model(path, "float32", progress=False)[1:] for path in (file, tmp_path / "hf")]


@pytest.mark.parametrize("case", FAMILIES)
def test_weights_and_config_are_those_of_the_hugging_face_directory(case, make_checkpoint, tmp_path):
    """test_decoder_parity.py compares the logits of such directories with transformers."""
    family, overrides = FAMILIES[case]
    _, model = make_checkpoint(family, **SHAPE, **overrides)
    rope, metadata = model.config.rope_parameters, {}
    if rope["rope_type"] == "linear":
        metadata = {"llama.rope.scaling.type": "linear", "llama.rope.scaling.factor": rope["factor"]}
    (params, config), (expected, hf_config) = load_both(tmp_path / "model.gguf", model, tmp_path, metadata=metadata)
    jax.tree.map(np.testing.assert_array_equal, params, expected)
    assert config.rms_norm_eps == pytest.approx(hf_config.rms_norm_eps, rel=1e-6)  # float32 in the file
    assert config.family == {"mistral": "llama"}.get(family, family)  # llama.cpp writes Mistral as a Llama
    assert dataclasses.replace(config, rms_norm_eps=hf_config.rms_norm_eps, family=family) == hf_config


def test_logits_are_those_of_transformers_reading_the_file(make_checkpoint, decoder_logits, tmp_path):
    _, model = make_checkpoint("llama", **SHAPE)
    write_model(tmp_path / "model.gguf", model, mixed)
    options = {"gguf_file": "model.gguf", "dtype": torch.float32, "attn_implementation": "eager"}
    expected = torch_logits(transformers.AutoModelForCausalLM.from_pretrained(tmp_path, **options).eval())
    assert_same_logits(tmp_path / "model.gguf", expected, decoder_logits)


@pytest.mark.parametrize("kind", [*QUANTISABLE, *K_QUANTS])
def test_every_tensor_type_is_read(kind, make_checkpoint, tmp_path):
    """The expected weights are dequantised by the library gguf."""
    _, model = make_checkpoint("llama", **WIDE)
    state = write_model(tmp_path / "model.gguf", model, lambda name: kind)
    _, params, _ = load_model(tmp_path / "model.gguf", "float32", progress=False)
    np.testing.assert_array_equal(params["embed"]["embedding"], state["model.embed_tokens.weight"])
    for stack, name in (("o", "self_attn.o_proj"), ("down", "mlp.down_proj")):
        np.testing.assert_array_equal(params["layers"][1][stack]["kernel"].T, state[f"model.layers.1.{name}.weight"])


def test_rope_frequencies_of_llama_3_are_read(make_checkpoint, decoder_logits, tmp_path):
    """transformers does not read them from a file: the reference is the model with the weights of the file."""
    _, model = make_checkpoint("llama", **SHAPE, rope_parameters=LLAMA3_ROPE)
    plain = LLAMA3_ROPE["rope_theta"] ** (-np.arange(0, 16, 2, dtype=np.float32) / 16)
    factors = plain / model.model.rotary_emb.inv_freq.numpy()
    assert factors.min() < 2 and factors.max() == pytest.approx(8)
    tensors = {"rope_freqs.weight": (factors.astype(np.float32), "F32")}
    model.load_state_dict(write_model(tmp_path / "model.gguf", model, mixed, tensors=tensors))
    assert_same_logits(tmp_path / "model.gguf", torch_logits(model), decoder_logits)


@pytest.fixture(scope="module")
def llama(make_checkpoint) -> torch.nn.Module:
    return make_checkpoint("llama", **SHAPE)[1]


@pytest.fixture(scope="module")
def llama_file(llama, tmp_path_factory):
    file = tmp_path_factory.mktemp("gguf") / "tiny.Q8_0.gguf"
    write_model(file, llama, mixed)
    return file


def test_end_of_sequence_and_end_of_turn_are_both_end_tokens(llama, tmp_path):
    write_model(tmp_path / "model.gguf", llama, metadata={"tokenizer.ggml.eot_token_id": 7})
    assert ModelConfig.from_directory(tmp_path / "model.gguf").eos_token_ids == (2, 7)


def test_directory_with_one_file_stands_for_it(llama_file, tmp_path):
    assert ModelConfig.from_directory(llama_file.parent) == ModelConfig.from_directory(llama_file)
    for name in ("a.gguf", "b.gguf"):
        shutil.copy(llama_file, tmp_path / name)
    with pytest.raises(CheckpointError, match=r"2 GGUF files \(a.gguf, b.gguf\) and no config.json; name one"):
        ModelConfig.from_directory(tmp_path)


def test_a_directory_with_a_config_is_a_hugging_face_directory(make_checkpoint, llama_file, tmp_path):
    shutil.copytree(make_checkpoint("qwen2")[0], tmp_path, dirs_exist_ok=True)
    shutil.copy(llama_file, tmp_path)
    assert load_model(tmp_path, "float32", progress=False)[2].family == "qwen2"


def test_model_cache_is_used_until_the_file_changes(llama, llama_file, tmp_path, monkeypatch):
    file = shutil.copy(llama_file, tmp_path / "model.gguf")
    _, converted, _ = load_model(file, "float32", tmp_path / "cache", progress=False)
    with monkeypatch.context() as patched:
        patched.setattr("slora_jax.models.load.load_weights", None)  # not called again
        _, cached, _ = load_model(file, "float32", tmp_path / "cache", progress=False)
    jax.tree.map(np.testing.assert_array_equal, converted, cached)
    write_model(file, llama, lambda name: "Q4_0")
    _, changed, _ = load_model(file, "float32", tmp_path / "cache", progress=False)
    assert (np.asarray(changed["embed"]["embedding"]) != np.asarray(converted["embed"]["embedding"])).any()


def test_shards_of_a_file_are_parts_of_the_whole(make_checkpoint, tmp_path):
    _, model = make_checkpoint("qwen2", **SHAPE)
    model.save_pretrained(tmp_path / "hf", state_dict=write_model(tmp_path / "model.gguf", model, mixed))
    parallel = tensor_parallel(ModelConfig.from_directory(tmp_path / "hf"), 2)
    paths = (tmp_path / "hf", tmp_path / "model.gguf")
    expected, found = (load_model(path, "float32", progress=False, parallel=parallel)[1] for path in paths)
    jax.tree.map(np.testing.assert_array_equal, expected, found)


def test_bfloat16_weights_are_rounded_float32(llama_file):
    exact, rounded = (load_model(llama_file, dtype, progress=False)[1] for dtype in ("float32", "bfloat16"))
    for layer in (0, 1):
        kernels = [params["layers"][layer]["qkv"]["kernel"] for params in (exact, rounded)]
        np.testing.assert_array_equal(np.asarray(kernels[0].astype("bfloat16")), np.asarray(kernels[1]))


def test_dequantises_at_most_a_block_of_rows_at_a_time(llama_file, monkeypatch):
    import gguf

    sizes, dequantize = [], gguf.dequantize
    monkeypatch.setattr("slora_jax.models.hf._BLOCK_BYTES", 1000)
    monkeypatch.setattr(gguf, "dequantize", lambda data, kind: sizes.append(data.nbytes) or dequantize(data, kind))
    load_model(llama_file, "float32", progress=False)
    assert max(sizes) <= 1000 and len(sizes) > 80


def test_progress_counts_the_bytes_of_the_file(llama_file, capfd):
    load_model(llama_file, "float32")
    assert "100%" in capfd.readouterr().err


REFUSED_METADATA = [
    ({"general.architecture": "gemma2"}, "general.architecture='gemma2'.*supported.*llama.*qwen3"),
    ({"llama.rope.scaling.type": "yarn", "llama.rope.scaling.factor": 4.0}, "llama.rope.scaling.type='yarn'.*linear"),
    ({"llama.expert_count": 8}, "llama.expert_count=8.*supported: 0"),
    ({"llama.attention.sliding_window": 32}, "llama.attention.sliding_window=32.*0, or 128"),
    ({"llama.rope.dimension_count": 8}, "llama.rope.dimension_count=8.*16"),
    ({"llama.attention.value_length": 32}, "llama.attention.value_length=32.*16"),
    ({"llama.final_logit_softcapping": 30.0}, "llama.final_logit_softcapping=30.0"),
    ({"llama.logit_scale": 8.0}, "llama.logit_scale=8.0"),
    ({"llama.attention.head_count_kv": [2, 1]}, r"llama.attention.head_count_kv=\[2, 1\].*every layer"),
    ({"llama.attention.head_count_kv": 3}, "num_key_value_heads=3.*divisor"),
]


@pytest.mark.parametrize(("metadata", "message"), REFUSED_METADATA)
def test_metadata_that_changes_the_logits_is_refused(metadata, message, llama, tmp_path):
    file = tmp_path / "model.gguf"
    fields = {"general.architecture": "llama", **gguf_metadata(llama.config, "llama"), **metadata}
    write_file(file, fields)
    with pytest.raises(UnsupportedModelError, match=f"model.gguf: .*{message}"):
        ModelConfig.from_directory(file)


def test_missing_metadata_is_named(llama, tmp_path):
    write_model(tmp_path / "model.gguf", llama, metadata={"llama.block_count": None})
    with pytest.raises(CheckpointError, match="model.gguf: metadata llama.block_count is missing"):
        ModelConfig.from_directory(tmp_path / "model.gguf")


def test_unknown_metadata_is_named_in_a_warning(llama, tmp_path, caplog):
    write_model(tmp_path / "model.gguf", llama, metadata={"llama.mood": "good", "general.quantized_by": "me"})
    ModelConfig.from_directory(tmp_path / "model.gguf")
    assert [record.getMessage().split(": ", 1)[1] for record in caplog.records] == [
        "metadata not known here and ignored: llama.mood='good'"
    ]


ROW = np.zeros((64, 64), np.float32)
NAN_ROW = np.where(np.arange(64) == 7, np.float32(np.nan), ROW)
REFUSED_TENSORS = [
    ({"blk.0.attn_k.weight": None}, "missing tensors in model.gguf: blk.0.attn_k.weight"),
    ({"blk.0.ffn_gate_exps.weight": (ROW, "F32")}, "unexpected tensor blk.0.ffn_gate_exps.weight"),
    ({"blk.7.attn_v.weight": (ROW, "F32")}, "unexpected tensor blk.7.attn_v.weight"),
    (
        {"blk.0.attn_output.weight": (ROW[:, :32], "F32")},
        r"attn_output.weight: expected shape \(64, 64\), .*\(64, 32\)",
    ),
    ({"blk.0.attn_output.weight": (np.zeros((64, 36), np.uint8), "IQ4_NL")}, "attn_output.weight: type IQ4_NL.*Q6_K"),
    ({"blk.1.attn_q.weight": (NAN_ROW, "F32")}, "tensor blk.1.attn_q.weight: expected finite values"),
    ({"rope_freqs.weight": (np.ones(7, np.float32), "F32")}, "rope_freqs.weight: expected 8 factors, found 7"),
]


@pytest.mark.parametrize(("tensors", "message"), REFUSED_TENSORS)
def test_missing_unexpected_or_invalid_tensor_is_named(tensors, message, llama, tmp_path):
    write_model(tmp_path / "model.gguf", llama, tensors=tensors)
    with pytest.raises(CheckpointError, match=message):
        load_model(tmp_path / "model.gguf", "float32", progress=False)


@pytest.mark.parametrize("kept", [2, 20, 1000, 5000, -1000])
def test_a_truncated_file_is_named(kept, llama_file, tmp_path):
    file = tmp_path / "model.gguf"
    file.write_bytes(llama_file.read_bytes()[:kept])
    with pytest.raises(CheckpointError, match="model.gguf: "):
        load_model(file, "float32", progress=False)


def test_a_file_that_is_not_gguf_is_refused_by_name(tmp_path):
    with pytest.raises(CheckpointError, match="gone.gguf: no such file"):
        ModelConfig.from_directory(tmp_path / "gone.gguf")
    (tmp_path / "model.gguf").write_bytes(b"PK\x03\x04 and so on")
    with pytest.raises(CheckpointError, match="model.gguf: cannot be read as GGUF: it begins with b'PK"):
        ModelConfig.from_directory(tmp_path / "model.gguf")


def test_a_part_of_a_split_model_is_refused(llama, tmp_path):
    write_model(tmp_path / "m-00001-of-00003.gguf", llama, metadata={"split.count": 3, "split.no": 0})
    with pytest.raises(CheckpointError, match="split.count=3 .*one file.*3 parts with llama-gguf-split --merge"):
        ModelConfig.from_directory(tmp_path)


def test_damaged_header_raises_only_our_errors(llama_file, tmp_path):
    content, rng, file = llama_file.read_bytes(), np.random.default_rng(3), tmp_path / "model.gguf"
    for _ in range(60):
        damaged = bytearray(content)
        for at in rng.integers(4, 6000, 3):
            damaged[at] = rng.integers(0, 256)
        file.write_bytes(damaged)
        try:
            ModelConfig.from_directory(file)
        except (CheckpointError, UnsupportedModelError) as error:
            assert "model.gguf" in str(error)
