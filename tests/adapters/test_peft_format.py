"""Adapter directories: we read what PEFT saves, and PEFT runs what we write."""

import dataclasses
import json

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from slora_jax.adapters import LoraConfig, random_adapter, read_peft, write_peft
from slora_jax.adapters.geometry import module_name
from slora_jax.adapters.tensor_names import PREFIX, TensorName, parse
from slora_jax.errors import AdapterError

torch = pytest.importorskip("torch")
peft = pytest.importorskip("peft")

ADAPTERS = {
    "qv": {"target_modules": ["q_proj", "v_proj"], "r": 4, "lora_alpha": 8},
    "all_linear": {"target_modules": "all-linear", "r": 8, "lora_alpha": 4},
    "mixed": {
        "target_modules": ["q_proj", "k_proj", "o_proj", "gate_proj", "down_proj"],
        "r": 5,
        "lora_alpha": 7,
        "rank_pattern": {"k_proj": 2, r"layers\.1\..*gate_proj": 11},
        "alpha_pattern": {"o_proj": 3},
    },
    "rslora_some_layers": {
        "target_modules": ["v_proj", "up_proj"],
        "r": 9,
        "use_rslora": True,
        "layers_to_transform": 2,
    },
    "regex": {"target_modules": r".*\.[01]\.mlp\.(up|down)_proj", "r": 3},
}


def lora_layers(model):
    return {
        name.removeprefix("base_model.model."): module
        for name, module in model.named_modules()
        if isinstance(module, peft.tuners.lora.LoraLayer)
    }


def assert_same_deltas(adapter, model):
    layers = lora_layers(model)
    assert {module_name(*key) for key in adapter.a} == layers.keys() == {module_name(*key) for key in adapter.b}
    for key, a in adapter.a.items():
        expected = layers[module_name(*key)].get_delta_weight("default").detach().numpy()  # [d_out, d_in]
        ours = adapter.scales[key] * adapter.b[key].astype(np.float64) @ a.astype(np.float64)
        np.testing.assert_allclose(ours, expected, rtol=1e-6, atol=1e-6 * np.abs(expected).max())


def logits(model, seed=0):
    torch.manual_seed(seed)
    with torch.no_grad():
        return model(torch.randint(0, 32, (2, 7))).logits.numpy()


@pytest.mark.parametrize("fields", ADAPTERS.values(), ids=ADAPTERS.keys())
def test_read_gives_the_delta_weights_of_peft(peft_with_weights, geometry, tmp_path, fields):
    model = peft_with_weights(**fields)
    model.save_pretrained(tmp_path)
    adapter = read_peft(tmp_path, geometry)
    assert_same_deltas(adapter, model)
    assert all(matrix.dtype == np.float32 for matrix in (*adapter.a.values(), *adapter.b.values()))
    assert int(adapter.ranks.astype(bool).sum()) == len(adapter.a)
    adapter.check(geometry)


def test_adapter_without_experts_is_read_soon_for_a_model_of_many(geometry, tmp_path):
    """To match the name of every expert would take longer than an adapter's expressions may."""
    model = dataclasses.replace(geometry, expert_layers=(True,) * 3, num_experts=100_000, expert_width=8)
    write_peft(tmp_path, random_adapter(geometry, targets=["q"]))
    path = tmp_path / "adapter_config.json"
    config = json.loads(path.read_text()) | {"target_modules": r".*\.(self_attn|mlp).*\.q_proj"}
    path.write_text(json.dumps(config))
    assert set(read_peft(tmp_path, model).a) == {(layer, "q") for layer in range(3)}
    path.write_text(json.dumps(config | {"target_modules": ["q_proj", "down_proj"]}))
    with pytest.raises(AdapterError, match=r"missing tensor .*mlp\.experts\.0\.down_proj.*which .* targets"):
        read_peft(tmp_path, model)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_half_precision_weights_are_read_exactly(peft_with_weights, geometry, tmp_path, dtype):
    model = peft_with_weights(target_modules=["q_proj", "down_proj"], r=4)
    for parameter in model.parameters():
        parameter.data = parameter.data.to(getattr(torch, dtype))
    model.save_pretrained(tmp_path)
    adapter = read_peft(tmp_path, geometry)
    for key, a in adapter.a.items():
        layer = lora_layers(model)[module_name(*key)]
        np.testing.assert_array_equal(a, layer.lora_A["default"].weight.detach().float().numpy())
        np.testing.assert_array_equal(adapter.b[key], layer.lora_B["default"].weight.detach().float().numpy())


Q = "self_attn.q_proj.lora_A.weight"
Q12 = TensorName("model", 12, "self_attn.q_proj", "lora_A")
MAGNITUDE = Q12._replace(kind="lora_magnitude_vector")
NAMES: dict[TensorName | None, list[str]] = {
    Q12: [
        f"base_model.model.model.layers.12.{Q}",
        "base_model.model.model.layers.12.self_attn.q_proj.lora_A.default.weight",
        f"model.layers.12.{Q}",
        f"layers.12.{Q}",
        f"base_model.model.layers.12.{Q}",
        f"module.base_model.model.model.layers.12.{Q}",
        f"base_model.model._orig_mod.model.layers.12.{Q}",
        f"_orig_mod.base_model.model.model.layers.12.{Q}",
        f"base_model.model._fsdp_wrapped_module.model.layers.12._fsdp_wrapped_module.{Q}",
        f"base_model.model.model.layers.12._checkpoint_wrapped_module.{Q}",
    ],
    Q12._replace(parent="model.language_model"): [f"base_model.model.model.language_model.layers.12.{Q}"],
    Q12._replace(parent="language_model.model"): [
        f"base_model.model.language_model.model.layers.12.{Q}",
        f"language_model.model.layers.12.{Q}",
    ],
    Q12._replace(module="self_attn.qkv_proj"): [f"base_model.model.model.layers.12.{Q.replace('q_p', 'qkv_p')}"],
    TensorName("transformer.encoder", 12, "self_attention.query_key_value", "lora_A"): [
        "base_model.model.transformer.encoder.layers.12.self_attention.query_key_value.lora_A.weight"
    ],
    MAGNITUDE: [
        f"base_model.model.model.layers.12.self_attn.q_proj.lora_magnitude_vector{end}"
        for end in ("", ".weight", ".default", ".default.weight")
    ],
    Q12._replace(kind="lora_B.bias"): [
        f"base_model.model.model.layers.12.self_attn.q_proj.lora_B{adapter}.bias" for adapter in ("", ".default")
    ],
    Q12._replace(kind="bias"): [
        f"base_model.model.model.layers.12.self_attn.q_proj{part}.bias" for part in ("", ".base_layer")
    ],
    TensorName("model", None, "embed_tokens", "lora_embedding_A"): [
        f"base_model.model.model.embed_tokens.lora_embedding_A{end}" for end in ("", ".default")
    ],
    TensorName("model", None, "embed_tokens", "trainable_tokens_delta"): [
        f"base_model.model.model.embed_tokens.token_adapter.trainable_tokens_delta{end}" for end in ("", ".default")
    ],
    TensorName("model", None, "embed_tokens", "weight"): [
        f"base_model.model.model.embed_tokens{part}.weight" for part in ("", ".base_layer", ".modules_to_save.default")
    ],
    TensorName("model", None, "lm_head", "lora_A"): ["base_model.model.lm_head.lora_A.weight"],
    TensorName("model", None, "lm_head", "weight"): [
        f"{prefix}lm_head{part}.weight" for prefix in ("", PREFIX) for part in ("", ".modules_to_save")
    ],
    None: [
        f"base_model.model.model.vision_tower.encoder.layers.12.{Q}",
        "lora_te_text_model_encoder_layers_12_self_attn_q_proj.lora_down.weight",
        f"base_model.model.model.layers.012.{Q}",
        f"base_model.model.transformer.layers.12.{Q}",
    ],
    TensorName("model", 12, "mlp.experts.3.down_proj", "lora_A"): [
        "base_model.model.model.layers.12.mlp.experts.3.down_proj.lora_A.weight"
    ],
    TensorName("model", 12, "mlp.experts.base_layer", "lora_A"): [
        "base_model.model.model.layers.12.mlp.experts.base_layer.lora_A.weight"
    ],
}


@pytest.mark.parametrize(("parsed", "name"), [(parsed, name) for parsed, names in NAMES.items() for name in names])
def test_every_spelling_of_a_tensor_name_has_one_normal_form(parsed, name):
    assert parse(name) == parsed
    if parsed is not None:
        assert parse(str(parsed)) == parsed


def rename(directory, change):
    path = directory / "adapter_model.safetensors"
    save_file({change(name): tensor for name, tensor in load_file(path).items()}, path)


def test_adapter_of_a_wrapped_model_is_the_same_adapter(geometry, tmp_path):
    adapter = random_adapter(geometry, 4, seed=1)
    for prefix in ("module.base_model.model.model", "layers", "base_model.model.model.language_model"):
        write_peft(tmp_path, adapter)
        rename(tmp_path, lambda name, to=prefix: name.replace("base_model.model.model.layers", f"{to}.layers"))
        rename(tmp_path, lambda name: name.removeprefix("layers."))
        assert read_peft(tmp_path, geometry).digest == adapter.digest


@pytest.mark.parametrize(
    ("parent", "qkv", "gate_up", "renamed"),
    [
        ("model", "self_attn.qkv_proj", "mlp.gate_up_proj", {}),
        (
            "transformer.encoder",
            "self_attention.query_key_value",
            "mlp.dense_h_to_4h",
            {"self_attn.o_proj": "self_attention.dense", "mlp.down_proj": "mlp.dense_4h_to_h"},
        ),
    ],
)
def test_fused_module_is_read_as_plain_lora_of_its_projections(geometry, tmp_path, parent, qkv, gate_up, renamed):
    rng, d, kv, ffn, tensors, fused = np.random.default_rng(0), geometry.hidden_size, 16, 40, {}, {}
    modules = {qkv: (d, 32 + 2 * kv), gate_up: (d, 2 * ffn)}
    modules |= {renamed.get(m, m): dims for m, dims in (("self_attn.o_proj", (32, d)), ("mlp.down_proj", (ffn, d)))}
    for layer in range(3):
        for module, (d_in, d_out) in modules.items():
            a, b = rng.standard_normal((5, d_in), np.float32), rng.standard_normal((d_out, 5), np.float32)
            name = f"base_model.model.{parent}.layers.{layer}.{module}"
            tensors |= {f"{name}.lora_A.weight": a, f"{name}.lora_B.weight": b}
            fused[layer, module] = 3 * b @ a
    save_file(tensors, tmp_path / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": 5, "lora_alpha": 15, "target_modules": [m.split(".")[1] for m in modules]}
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    adapter = read_peft(tmp_path, geometry)
    assert len(adapter.a) == 21

    def delta(layer, *projections):
        own = [adapter.scales[layer, p] * adapter.b[layer, p] @ adapter.a[layer, p] for p in projections]
        return np.concatenate(own)

    for (layer, module), expected in fused.items():
        projections = {qkv: "qkv", gate_up: ("gate", "up")}.get(module, ("down",) if d == expected.shape[0] else ())
        if module.endswith(("o_proj", ".dense")):
            projections = "o"
        np.testing.assert_allclose(delta(layer, *projections), expected, rtol=1e-5, atol=1e-5)


def test_adapter_whose_targets_match_nothing_is_refused_with_the_nearest_names(geometry, tmp_path):
    write_peft(tmp_path, random_adapter(geometry, 4))
    path = tmp_path / "adapter_config.json"
    config = path.read_text()
    path.write_text(json.dumps(json.loads(config) | {"target_modules": ["qproj", "w1"]}))
    with pytest.raises(AdapterError, match=r"matches no projection of the 3 layers; nearest names: q_proj"):
        read_peft(tmp_path, geometry)
    path.write_text(config)
    rename(tmp_path, lambda name: name.replace("q_proj.lora_A", "q_prj.lora_A"))
    nearest = r"nearest known names: 'base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight'"
    with pytest.raises(AdapterError, match=rf"unexpected tensor '.*q_prj.lora_A.weight' \(and 2 more: .*{nearest}"):
        read_peft(tmp_path, geometry)


def test_patterns_of_a_multimodal_models_adapter_match_its_own_names(geometry, tmp_path):
    write_peft(tmp_path, random_adapter(geometry, 4, ("q", "v"), alpha=4))
    rename(tmp_path, lambda name: name.replace("model.layers", "model.language_model.layers"))
    path = tmp_path / "adapter_config.json"
    fields = {
        "target_modules": r".*language_model.*\.(q_proj|v_proj)",
        "alpha_pattern": {"model.language_model.layers.1.self_attn.q_proj": 32},
    }
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))
    scales = read_peft(tmp_path, geometry).scales
    assert scales == {(layer, p): 8 if (layer, p) == (1, "q") else 1 for layer in range(3) for p in "qv"}


@pytest.mark.parametrize("fields", ADAPTERS.values(), ids=ADAPTERS.keys())
def test_written_adapter_gives_identical_outputs_in_peft(peft_with_weights, tiny_llama, geometry, tmp_path, fields):
    model = peft_with_weights(**fields)
    model.save_pretrained(tmp_path / "peft")
    write_peft(tmp_path / "ours", read_peft(tmp_path / "peft", geometry))
    again = peft.PeftModel.from_pretrained(tiny_llama(), tmp_path / "ours").eval()
    np.testing.assert_array_equal(logits(again), logits(model))
    assert np.abs(logits(again) - logits(tiny_llama())).max() > 1e-2


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_random_adapter_loads_in_peft(tiny_llama, geometry, tmp_path, dtype):
    ranks = {"q": 8, "v": 3, "up": 16, "k": 0}
    adapter = random_adapter(geometry, ranks, alpha=6, seed=2)
    write_peft(tmp_path, adapter, dtype=dtype, base_model_name_or_path="tiny")
    model = peft.PeftModel.from_pretrained(tiny_llama(), tmp_path).eval()
    assert_same_deltas(read_peft(tmp_path, geometry), model)
    assert {layer.r["default"] for layer in lora_layers(model).values()} == {8, 3, 16}
    assert np.abs(logits(model) - logits(tiny_llama())).max() > 1e-2
    assert json.loads((tmp_path / "adapter_config.json").read_text())["base_model_name_or_path"] == "tiny"


def test_random_adapter_is_reproducible_and_nonzero(geometry):
    first, same, other = (random_adapter(geometry, 4, seed=seed) for seed in (3, 3, 4))
    assert first.digest == same.digest != other.digest
    assert all(np.abs(matrix).min(axis=None) > 0 for matrix in (*first.a.values(), *first.b.values()))
    assert first.ranks.tolist() == [[4] * 7] * 3


@pytest.mark.parametrize(("rank", "targets"), [({"x": 4}, ()), (4, ["q_proj"]), (4, []), ({"q": 0}, ())])
def test_random_adapter_refuses_unknown_targets(geometry, rank, targets):
    with pytest.raises(AdapterError, match="targets: expected some of q, k, v"):
        random_adapter(geometry, rank, targets)


def test_writing_an_adapter_whose_config_disagrees_is_refused(geometry, tmp_path):
    adapter = random_adapter(geometry, 4)
    for wrong in (LoraConfig(r=8, target_modules="all-linear"), LoraConfig(r=4, lora_alpha=4)):
        with pytest.raises(AdapterError, match=r"model\.layers\.0\.\S+: the config says"):
            write_peft(tmp_path / "out", dataclasses.replace(adapter, config=wrong))
    with pytest.raises(AdapterError, match="dtype: expected one of float16"):
        write_peft(tmp_path / "out", adapter, dtype="int8")
    assert not (tmp_path / "out").exists()


@pytest.mark.filterwarnings("ignore:PiSSA changes the base weights")
def test_converted_pissa_adapter_is_plain_lora(tiny_llama, geometry, tmp_path):
    """PiSSA subtracts from the base weights; only the converted form means what plain LoRA means."""
    model = peft.get_peft_model(
        tiny_llama(), peft.LoraConfig(r=4, target_modules=["q_proj"], init_lora_weights="pissa", task_type="CAUSAL_LM")
    )
    model.peft_config["default"].init_lora_weights = True
    model.save_pretrained(tmp_path / "initial")
    model.peft_config["default"].init_lora_weights = "pissa"
    with torch.no_grad():
        for layer in lora_layers(model).values():
            layer.lora_B["default"].weight.normal_()
    model.save_pretrained(tmp_path / "unconverted")
    with pytest.raises(AdapterError, match=r"adapter_config.json: init_lora_weights: 'pissa'"):
        read_peft(tmp_path / "unconverted", geometry)
    expected = logits(model.eval())
    model.save_pretrained(tmp_path / "plain", path_initial_model_for_weight_conversion=str(tmp_path / "initial"))
    write_peft(tmp_path / "ours", read_peft(tmp_path / "plain", geometry))
    again = peft.PeftModel.from_pretrained(tiny_llama(), tmp_path / "ours").eval()
    np.testing.assert_allclose(logits(again), expected, atol=1e-4)
