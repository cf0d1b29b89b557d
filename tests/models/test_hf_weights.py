"""Invalid checkpoint directories are refused with a CheckpointError that names file and tensor."""

import json
import shutil
import warnings

import numpy as np
import pytest
import torch
import transformers
from safetensors.numpy import load_file, save_file

from slora_jax.errors import CheckpointError
from slora_jax.models import load_model


@pytest.fixture
def checkpoint(make_checkpoint, tmp_path):
    """(directory, tensors) of a single-file checkpoint, for the test to damage."""
    directory = tmp_path / "model"
    shutil.copytree(make_checkpoint("llama", num_hidden_layers=1)[0], directory)
    return directory, load_file(directory / "model.safetensors")


def check_refused(directory, *message_parts):
    with pytest.raises(CheckpointError) as caught:
        load_model(directory, "float32", progress=False)
    for part in message_parts:
        assert part in str(caught.value)


LAYER = "model.layers.0"
EDITS = {
    "missing": ({f"{LAYER}.self_attn.k_proj.weight": None}, ["missing"]),
    "unexpected": ({f"{LAYER}.self_attn.q_proj.bias": np.zeros(64, np.float32)}, ["unexpected"]),
    "wrong shape": ({f"{LAYER}.mlp.up_proj.weight": np.zeros((112, 65), np.float32)}, ["(112, 64)", "(112, 65)"]),
    "integers": ({"model.norm.weight": np.ones(64, np.int8)}, ["I8"]),
}


@pytest.mark.parametrize("case", EDITS)
def test_invalid_tensor_is_named(checkpoint, case):
    directory, tensors = checkpoint
    (edit, parts) = EDITS[case]
    changed = {name: tensor for name, tensor in (tensors | edit).items() if tensor is not None}
    save_file(changed, directory / "model.safetensors")
    check_refused(directory, "model.safetensors", *edit, *parts)


def test_truncated_file(checkpoint):
    directory, _ = checkpoint
    file = directory / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    check_refused(directory, "model.safetensors", "cannot be read as safetensors")


def test_directory_without_weights(checkpoint):
    directory, _ = checkpoint
    (directory / "model.safetensors").unlink()
    check_refused(directory, "neither model.safetensors nor model.safetensors.index.json")


def test_pickled_weights_are_refused_with_the_reason(checkpoint):
    directory, _ = checkpoint
    (directory / "model.safetensors").rename(directory / "pytorch_model.bin")
    check_refused(directory, "pickled", "run code", "safetensors")


def test_missing_shard(tiny_checkpoint, tmp_path):
    directory = shutil.copytree(tiny_checkpoint, tmp_path / "model")
    shard = sorted(directory.glob("*.safetensors"))[1]
    shard.unlink()
    check_refused(directory, "shards", shard.name)


def test_tensor_in_two_shards(tiny_checkpoint, tmp_path):
    directory = shutil.copytree(tiny_checkpoint, tmp_path / "model")
    first, second = sorted(directory.glob("*.safetensors"))[:2]
    tensors = load_file(first)
    name = next(iter(tensors))
    save_file({**load_file(second), name: tensors[name]}, second)
    check_refused(directory, second.name, name, first.name)


def test_index_without_a_weight_map(tiny_checkpoint, tmp_path):
    directory = shutil.copytree(tiny_checkpoint, tmp_path / "model")
    (directory / "model.safetensors.index.json").write_text("{}")
    check_refused(directory, "weight_map")


@pytest.fixture
def tied(make_checkpoint, tmp_path):
    """(directory, tensors) of a model with tied embeddings."""
    directory = tmp_path / "tied"
    shutil.copytree(make_checkpoint("llama", tie_word_embeddings=True)[0], directory)
    tensors = load_file(directory / "model.safetensors")
    assert "lm_head.weight" not in tensors
    return directory, tensors


def test_redundant_tensors_with_the_expected_values_are_ignored(tied):
    directory, tensors = tied
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"]
    frequencies = 10000.0 ** -(np.arange(0, 16, 2) / 16)
    for index in range(2):
        tensors[f"model.layers.{index}.self_attn.rotary_emb.inv_freq"] = frequencies.astype(np.float16)
    save_file(tensors, directory / "model.safetensors")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        _, params, config = load_model(directory, "float32", progress=False)
    assert "lm_head" not in params and config.tie_word_embeddings
    np.testing.assert_array_equal(params["embed"]["embedding"], tensors["model.embed_tokens.weight"])


def test_rotary_buffers_with_other_values_warn_once(tied):
    directory, tensors = tied
    for index in range(2):
        tensors[f"model.layers.{index}.self_attn.rotary_emb.inv_freq"] = np.ones(8, np.float32)
    save_file(tensors, directory / "model.safetensors")
    with pytest.warns(UserWarning, match="inv_freq in the checkpoint differs") as caught:
        load_model(directory, "float32", progress=False)
    assert len(caught) == 1


@pytest.mark.parametrize("family", ["llama", "qwen2"])
def test_own_head_of_a_tied_model_is_used_as_in_transformers(family, make_checkpoint, decoder_logits, tmp_path):
    directory = shutil.copytree(make_checkpoint(family, tie_word_embeddings=True)[0], tmp_path / "model")
    tensors = load_file(directory / "model.safetensors")
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"][::-1].copy()
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    with pytest.warns(UserWarning, match="tie_word_embeddings=true, but .* different values; the head is used"):
        graphdef, params, config = load_model(directory, "float32", progress=False)
    assert not config.tie_word_embeddings
    prompt = np.random.default_rng(0).integers(0, 96, 17)
    model = transformers.AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()
    with torch.no_grad():
        expected = model(torch.from_numpy(prompt)[None]).logits[0].numpy()
    found = decoder_logits(graphdef, params, [prompt])
    assert np.abs(found - expected).max() <= 1e-4 * np.abs(expected).max()


@pytest.mark.parametrize(("dtype", "value"), [("float32", np.nan), ("bfloat16", -np.inf), ("bfloat16", 3.4e38)])
def test_value_that_is_not_finite_is_refused(checkpoint, dtype, value):
    """Includes a finite value beyond the range of bfloat16."""
    directory, tensors = checkpoint
    tensors["model.layers.0.mlp.up_proj.weight"][3, 5] = value
    save_file(tensors, directory / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"model.safetensors: tensor model.layers.0.mlp.up_proj.weight: .*finite"):
        load_model(directory, dtype, progress=False)


def test_rows_are_split_into_blocks_without_loss(checkpoint, monkeypatch):
    directory, tensors = checkpoint
    monkeypatch.setattr("slora_jax.models.hf._BLOCK_BYTES", 1000)
    _, params, _ = load_model(directory, "float32", progress=False)
    parts = [tensors[f"model.layers.0.self_attn.{part}_proj.weight"].T for part in "qkv"]
    np.testing.assert_array_equal(params["layers"][0]["qkv"]["kernel"], np.concatenate(parts, axis=1))


def test_progress_counts_bytes_on_stderr_and_can_be_off(checkpoint, capfd):
    directory, tensors = checkpoint
    load_model(directory, "float32", progress=False)
    assert capfd.readouterr() == ("", "")
    load_model(directory, "float32")
    captured = capfd.readouterr()
    assert captured.out == ""
    total = sum(tensor.nbytes for tensor in tensors.values())
    assert f"{total / 1000:.0f}k/{total / 1000:.0f}k" in captured.err


def test_extra_safetensors_file_is_ignored(checkpoint):
    directory, _ = checkpoint
    (directory / "consolidated.safetensors").write_bytes(b"not read")
    (directory / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"x": "gone.safetensors"}}))
    load_model(directory, "float32", progress=False)
