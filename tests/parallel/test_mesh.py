"""Models that cannot be sharded are refused by field; each device gets its part of a checkpoint."""

import dataclasses
import json
from pathlib import Path

import jax
import numpy as np
import pytest
from flax import traverse_util
from safetensors.numpy import save_file
from tiny_model import hf_tensors

from slora_jax.engine import EngineConfig
from slora_jax.errors import ConfigError
from slora_jax.models import ModelConfig, init_random, load_model
from slora_jax.models.shards import shard_params
from slora_jax.parallel.layout import Shards
from slora_jax.parallel.mesh import cut, make_mesh, tensor_parallel

HF_CONFIG = {
    "model_type": "llama",
    "vocab_size": 31,
    "hidden_size": 24,
    "intermediate_size": 40,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 6,
    "max_position_embeddings": 32,
    "attention_bias": True,
    "mlp_bias": True,
}
MODEL = ModelConfig.from_dict(HF_CONFIG)


@pytest.mark.parametrize(
    ("changes", "count", "message"),
    [
        ({}, 3, r"EngineConfig.tensor_parallel_size=3: the model's num_heads=4 must be a multiple"),
        ({"intermediate_size": 41}, 2, r"the model's intermediate_size=41 must be a multiple"),
        ({"hidden_size": 27}, 2, r"the model's hidden_size=27 must be a multiple"),
        (
            {"num_heads": 12, "num_kv_heads": 3, "hidden_size": 24},
            4,
            r"num_kv_heads=3 must be a multiple of it, or divide",
        ),
    ],
)
def test_model_that_cannot_be_sharded_is_refused_by_field(changes, count, message):
    with pytest.raises(ConfigError, match=message):
        cut(dataclasses.replace(MODEL, **changes), count)


def test_more_shards_than_devices_are_refused():
    with pytest.raises(
        ConfigError, match=r"EngineConfig.tensor_parallel_size=64, tp_first_device=0: there are 8 cpu devices"
    ):
        make_mesh(64)
    with pytest.raises(ConfigError, match=r"EngineConfig.tensor_parallel_size=4, tp_first_device=6: there are 8"):
        make_mesh(4, first=6)
    with pytest.raises(ConfigError, match=r"EngineConfig.tp_first_device=1: must be 0, unless"):
        EngineConfig(tp_first_device=1)
    with pytest.raises(ConfigError, match=r"EngineConfig.tensor_parallel_size=0: must be an integer of at least 1"):
        EngineConfig(tensor_parallel_size=0)
    with pytest.raises(ConfigError, match=r"EngineConfig.tp_lora='vllm': must be 'slora' or"):
        EngineConfig(tp_lora="vllm")  # type: ignore[arg-type]


def test_kv_heads_fewer_than_shards_are_shared_by_neighbours():
    assert cut(MODEL, 2) == Shards(2, 2)
    shared = cut(MODEL, 4)
    assert shared == Shards(4, 2)
    assert [shared.kv_part(12, shard) for shard in range(4)] == [slice(0, 6)] * 2 + [slice(6, 12)] * 2
    assert shared.of_model(MODEL).num_kv_heads == 1


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict, dict]:
    """Returns a model directory, its tensors by Hugging Face name, and the parameters of one device."""
    directory = tmp_path_factory.mktemp("model")
    _, params = init_random(MODEL, "float32", seed=0)
    tensors = hf_tensors(MODEL, params)
    save_file(tensors, directory / "model.safetensors")
    (directory / "config.json").write_text(json.dumps(HF_CONFIG))
    return directory, tensors, params


@pytest.mark.parametrize("count", [2, 4])
def test_each_device_holds_its_part_of_the_checkpoint(checkpoint, count):
    directory, tensors, whole = checkpoint
    parallel = tensor_parallel(MODEL, count)
    graphdef, params, config = load_model(directory, "float32", progress=False, parallel=parallel)
    assert config == MODEL

    def on(shard: int, *path: str | int) -> np.ndarray:
        leaf = params
        for key in path:
            leaf = leaf[key]
        by_device = {part.device: part.data for part in leaf.addressable_shards}
        return np.asarray(by_device[parallel.devices[shard]])

    layer = "model.layers.0"
    heads, size = 24 // count, 40 // count
    for shard in range(count):
        q, kv = slice(shard * heads, (shard + 1) * heads), parallel.shards.kv_part(12, shard)
        ffn = slice(shard * size, (shard + 1) * size)
        for kind, axes in (("weight", "kernel"), ("bias", "bias")):
            parts = [
                tensors[f"{layer}.self_attn.{p}_proj.{kind}"][rows] for p, rows in (("q", q), ("k", kv), ("v", kv))
            ]
            np.testing.assert_array_equal(on(shard, "layers", 0, "qkv", axes), np.concatenate(parts).T)
            parts = [tensors[f"{layer}.mlp.{p}_proj.{kind}"][ffn] for p in ("gate", "up")]
            np.testing.assert_array_equal(on(shard, "layers", 0, "gate_up", axes), np.concatenate(parts).T)
        for stack, name, columns in (("o", "self_attn.o_proj", q), ("down", "mlp.down_proj", ffn)):
            weight, bias = (tensors[f"{layer}.{name}.{kind}"] for kind in ("weight", "bias"))
            np.testing.assert_array_equal(on(shard, "layers", 0, stack, "kernel"), weight[:, columns].T)
            np.testing.assert_array_equal(on(shard, "layers", 0, stack, "bias"), bias if shard == 0 else 0 * bias)
        rows = -(-31 // count)
        own = tensors["model.embed_tokens.weight"][shard * rows : (shard + 1) * rows]
        np.testing.assert_array_equal(on(shard, "embed", "embedding")[: len(own)], own)
        assert not on(shard, "embed", "embedding")[len(own) :].any()
        own = tensors["lm_head.weight"][shard * rows : (shard + 1) * rows]
        np.testing.assert_array_equal(on(shard, "lm_head", "kernel")[:, : len(own)], own.T)

    cut_graphdef, cut_params = shard_params(MODEL, whole, parallel)  # the same from memory
    assert cut_graphdef == graphdef
    for path, leaf in traverse_util.flatten_dict(params).items():
        other = traverse_util.flatten_dict(cut_params)[path]
        assert leaf.sharding == other.sharding
        np.testing.assert_array_equal(np.asarray(leaf), np.asarray(other))
    assert shard_params(MODEL, params, parallel)[1] is params


def test_model_cache_keeps_shards(checkpoint, tmp_path, monkeypatch):
    directory, _, _ = checkpoint
    parallel = tensor_parallel(MODEL, 2)
    cold = load_model(directory, "float32", tmp_path, False, parallel)[1]
    monkeypatch.setattr("slora_jax.models.load.load_weights", None)  # not called again
    warm = load_model(directory, "float32", tmp_path, False, parallel)[1]
    for one, other in zip(jax.tree.leaves(cold), jax.tree.leaves(warm), strict=True):
        assert one.sharding == other.sharding
        np.testing.assert_array_equal(np.asarray(one), np.asarray(other))
