"""The Orbax cache is used when valid, rebuilt when stale or damaged, and never prevents a load."""

import logging
import os
import shutil

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import slora_jax.models.cache
import slora_jax.models.load
from slora_jax.models import load_model


@pytest.fixture
def checkpoint(make_checkpoint, tmp_path):
    directory = tmp_path / "model"
    shutil.copytree(make_checkpoint("qwen2", num_hidden_layers=1)[0], directory)
    return directory


@pytest.fixture
def conversions(monkeypatch):
    """Arguments of every conversion from safetensors so far."""
    calls = []
    convert = slora_jax.models.load.load_weights
    monkeypatch.setattr(slora_jax.models.load, "load_weights", lambda *a: (calls.append(a), convert(*a))[1])
    return calls


def check_equal(first, second):
    assert jax.tree.structure(first) == jax.tree.structure(second)
    for left, right in zip(jax.tree.leaves(first), jax.tree.leaves(second), strict=True):
        assert (left.dtype, left.sharding, left.committed) == (right.dtype, right.sharding, right.committed)
        np.testing.assert_array_equal(left, right)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_round_trip(dtype, checkpoint, tmp_path, conversions, decoder_logits, caplog):
    graphdef, direct, config = load_model(checkpoint, dtype, progress=False)
    cold = load_model(checkpoint, dtype, tmp_path / "cache", progress=False)
    assert len(conversions) == 2
    warm = load_model(checkpoint, dtype, tmp_path / "cache", progress=False)
    assert len(conversions) == 2
    assert cold[0] == warm[0] == graphdef
    assert cold[2] == warm[2] == config
    check_equal(direct, cold[1])
    check_equal(direct, warm[1])
    prompt = [np.arange(9)]
    np.testing.assert_array_equal(decoder_logits(graphdef, direct, prompt), decoder_logits(*warm[:2], prompt))
    assert not [record for record in caplog.records if record.levelno >= logging.WARNING]
    assert len(list((tmp_path / "cache").iterdir())) == 1


def test_dtypes_and_directories_have_their_own_entries(checkpoint, tmp_path, conversions):
    twin = shutil.copytree(checkpoint, tmp_path / "elsewhere" / "model")
    for directory in (checkpoint, twin):
        for dtype in ("float32", "bfloat16"):
            load_model(directory, dtype, tmp_path / "cache", progress=False)
    assert len(conversions) == 4
    assert len(list((tmp_path / "cache").iterdir())) == 4


@pytest.mark.parametrize("keep_time", [False, True])
def test_changed_weights_replace_a_stale_entry(keep_time, checkpoint, tmp_path, conversions, caplog):
    load_model(checkpoint, "float32", tmp_path / "cache", progress=False)
    file = checkpoint / "model.safetensors"
    times = (file.stat().st_atime_ns, file.stat().st_mtime_ns)
    tensors = {name: tensor + 1 for name, tensor in load_file(file).items()}
    save_file(tensors, file, metadata={"format": "pt"})
    if keep_time:
        os.utime(file, ns=times)
    for _ in range(2):
        _, params, _ = load_model(checkpoint, "float32", tmp_path / "cache", progress=False)
        np.testing.assert_array_equal(params["norm"]["scale"], tensors["model.norm.weight"])
    assert len(conversions) == 2
    assert "another state of the checkpoint" in caplog.text
    assert len(list((tmp_path / "cache").iterdir())) == 1


def test_another_converter_version_is_stale(checkpoint, tmp_path, conversions, monkeypatch):
    load_model(checkpoint, "float32", tmp_path / "cache", progress=False)
    monkeypatch.setattr(slora_jax.models.cache, "CONVERTER_VERSION", -1)
    load_model(checkpoint, "float32", tmp_path / "cache", progress=False)
    assert len(conversions) == 2


def flip_a_byte(entry):
    file = max((path for path in entry.rglob("*") if path.is_file()), key=lambda path: path.stat().st_size)
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


def truncate(entry):
    file = max((path for path in entry.rglob("*") if path.is_file()), key=lambda path: path.stat().st_size)
    file.write_bytes(file.read_bytes()[:-1000])


def remove_the_arrays(entry):
    shutil.rmtree(entry / "params")


def remove_the_manifest(entry):
    (entry / "manifest.json").unlink()


def garble_the_manifest(entry):
    (entry / "manifest.json").write_text("{]")


def replace_by_a_file(entry):
    shutil.rmtree(entry)
    entry.write_text("not a directory")


@pytest.mark.parametrize(
    "damage",
    [flip_a_byte, truncate, remove_the_arrays, remove_the_manifest, garble_the_manifest, replace_by_a_file],
)
def test_a_damaged_entry_is_rebuilt_with_a_warning(damage, checkpoint, tmp_path, conversions, caplog):
    _, expected, _ = load_model(checkpoint, "float32", tmp_path / "cache", progress=False)
    (entry,) = (tmp_path / "cache").iterdir()
    damage(entry)
    for _ in range(2):
        check_equal(load_model(checkpoint, "float32", tmp_path / "cache", progress=False)[1], expected)
    assert len(conversions) == 2
    assert "cannot be used" in caplog.text


def test_damage_that_only_orbax_detects_is_not_fatal(checkpoint, tmp_path, conversions, monkeypatch, caplog):
    _, expected, _ = load_model(checkpoint, "float32", tmp_path / "cache", progress=False)
    (entry,) = (tmp_path / "cache").iterdir()
    manifest_checksums = slora_jax.models.cache._checksums(entry / "params")
    for file in entry.rglob("d/*"):
        file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
    monkeypatch.setattr(slora_jax.models.cache, "_checksums", lambda directory: manifest_checksums)
    check_equal(load_model(checkpoint, "float32", tmp_path / "cache", progress=False)[1], expected)
    assert len(conversions) == 2
    assert "cannot be used" in caplog.text


def test_failed_write_leaves_no_entry(checkpoint, tmp_path, conversions, monkeypatch, caplog):
    def fail_half_way(path, params):
        path.mkdir()
        (path / "half").write_text("written")
        raise OSError("no space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(slora_jax.models.cache, "_save", fail_half_way)
        load_model(checkpoint, "float32", tmp_path / "cache", progress=False)
    assert "no space left on device" in caplog.text
    assert list((tmp_path / "cache").iterdir()) == []
    load_model(checkpoint, "float32", tmp_path / "cache", progress=False)
    load_model(checkpoint, "float32", tmp_path / "cache", progress=False)
    assert len(conversions) == 2


def test_unusable_cache_directory_is_a_warning(checkpoint, tmp_path, caplog):
    (tmp_path / "cache").write_text("a file")
    load_model(checkpoint, "float32", tmp_path / "cache", progress=False)
    assert "could not be cached" in caplog.text
