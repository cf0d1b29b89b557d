"""Adapters' changes of the output head and the embedding, read as LoRA of low rank."""

import json

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from slora_jax.adapters import random_adapter, read_peft, write_peft
from slora_jax.errors import AdapterError

PREFIX = "base_model.model."


class Base:
    """A base model's embedding and head."""

    def __init__(self, rng, is_tied=False):
        self.is_tied = is_tied
        embed, head = rng.standard_normal((2, 32, 24)).astype(np.float32)
        self._rows = {"embed": embed, "head": embed if is_tied else head}

    def rows(self, end):
        return self._rows[end]


def directory(path, geometry, tensors, **fields):
    """Writes an adapter with further tensors and fields."""
    write_peft(path, random_adapter(geometry, 4, ("q",)))
    file, config = path / "adapter_model.safetensors", path / "adapter_config.json"
    save_file(load_file(file) | {PREFIX + name: tensor for name, tensor in tensors.items()}, file)
    config.write_text(json.dumps(json.loads(config.read_text()) | fields))
    return path


def changes(adapter):
    return {end: b @ a for end, (a, b) in adapter.ends.items()}


@pytest.mark.parametrize("is_tied", [False, True])
def test_matrices_saved_whole_are_redundant_or_a_few_changed_rows(geometry, tmp_path, rng, is_tied):
    base = Base(rng, is_tied)
    old, new = base.rows("embed"), base.rows("embed").copy()
    same = {"lm_head.weight": base.rows("head"), "model.embed_tokens.base_layer.weight": old}
    assert read_peft(directory(tmp_path / "same", geometry, same), geometry, base=base).ends == {}
    new[[3, 30]] += 1
    changed = {"model.embed_tokens.weight": new}
    adapter = read_peft(directory(tmp_path / "a", geometry, changed), geometry, base=base)
    found = changes(adapter)  # PEFT loads a matrix that is no trained module into the base model itself
    assert found.keys() == ({"embed", "head"} if is_tied else {"embed"})
    np.testing.assert_allclose(found["embed"].T, new - old, atol=1e-6)
    if is_tied:
        np.testing.assert_allclose(found["head"], new - old, atol=1e-6)
    fields = {"modules_to_save": ["embed_tokens"]}
    assert changes(read_peft(directory(tmp_path / "b", geometry, changed, **fields), geometry, base=base)).keys() == {
        "embed"
    }
    adapter.check(geometry)


def test_trained_tokens_change_the_embedding_and_a_tied_head(geometry, tmp_path, rng):
    rows = rng.standard_normal((2, 24)).astype(np.float32)
    tensors = {"model.embed_tokens.token_adapter.trainable_tokens_delta": rows}
    path = directory(tmp_path / "a", geometry, tensors, trainable_token_indices=[31, 4])
    for is_tied in (False, True):
        base = Base(rng, is_tied)
        found = changes(read_peft(path, geometry, base=base))
        assert found.keys() == ({"embed", "head"} if is_tied else {"embed"})
        expected = np.zeros((32, 24))
        expected[[31, 4]] = rows - base.rows("embed")[[31, 4]]
        np.testing.assert_allclose(found["embed"].T, expected, atol=1e-6)
        if is_tied:
            np.testing.assert_allclose(found["head"], expected, atol=1e-6)
    tokens = {"lm_head.token_adapter.trainable_tokens_delta": rows}
    fields = {"trainable_token_indices": {"lm_head": [0, 1]}}
    found = changes(read_peft(directory(tmp_path / "b", geometry, tokens, **fields), geometry, base=base))
    assert found.keys() == {"head"} and np.flatnonzero(found["head"].any(1)).tolist() == [0, 1]


def test_matrix_with_many_changed_rows_is_refused_with_its_size_and_a_remedy(geometry, tmp_path, rng, monkeypatch):
    monkeypatch.setattr("slora_jax.adapters.ends.MAX_RANK", 8)
    base = Base(rng)
    path = directory(tmp_path, geometry, {"lm_head.weight": base.rows("head") + 1}, modules_to_save=["lm_head"])
    reason = r"lm_head.weight': 32 of its 32 rows differ .* at most 8 .* 3072 bytes .* Train lm_head by LoRA"
    with pytest.raises(AdapterError, match=reason):
        read_peft(path, geometry, base=base)


REFUSED = {
    "no base model": ({"lm_head.weight": np.zeros((32, 24), np.float32)}, {}, "needs the weights of the base model"),
    "other vocabulary": ({"lm_head.weight": np.zeros((40, 24), np.float32)}, {}, "resized vocabulary"),
    "token out of range": (
        {"model.embed_tokens.token_adapter.trainable_tokens_delta": np.zeros((1, 24), np.float32)},
        {"trainable_token_indices": [32]},
        r"trainable_token_indices: must be in 0..31, found \[32\]",
    ),
    "missing matrix": ({}, {"modules_to_save": ["lm_head"]}, "missing tensor weight of lm_head"),
    "twice": (
        {name: np.zeros((32, 24), np.float32) for name in ("lm_head.weight", "lm_head.base_layer.weight")},
        {},
        "the same weight twice",
    ),
    "missing": ({}, {"target_modules": ["q_proj", "lm_head"]}, "missing tensor lora_A of lm_head"),
    "tied LoRA": (
        {},
        {"target_modules": ["q_proj", "embed_tokens"], "ensure_weight_tying": True},
        "ensure_weight_tying",
    ),
    "dora": ({}, {"target_modules": ["q_proj", "lm_head"], "use_dora": True}, "use_dora: is not supported .* lm_head"),
}


@pytest.mark.parametrize(("tensors", "fields", "reason"), REFUSED.values(), ids=REFUSED.keys())
def test_end_that_cannot_be_served_is_refused_by_name(geometry, tmp_path, tensors, fields, reason):
    with pytest.raises(AdapterError, match=reason):
        read_peft(directory(tmp_path, geometry, tensors, **fields), geometry)
