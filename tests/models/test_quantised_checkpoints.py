"""Quantised checkpoints, written here in the layouts of their formats, give the values that those formats define."""

import json
import re
import shutil
import warnings

import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from slora_jax.errors import CheckpointError, UnsupportedModelError
from slora_jax.models import ModelConfig, load_model

D, FFN = 256, 384
NF4 = np.array(
    [-1, -0.6961928, -0.52507305, -0.39491749, -0.28444138, -0.18477343, -0.09105004, 0, 0.0795803, 0.1609302,
     0.2461123, 0.33791524, 0.44070983, 0.562617, 0.72295684, 1], np.float32)  # fmt: skip


def words(codes: np.ndarray, bits: int) -> np.ndarray:
    """Packs unsigned codes along the last axis into int32, the lowest bits first."""
    parts = codes.astype(np.uint32).reshape(*codes.shape[:-1], -1, 32 // bits)
    total = np.zeros(parts.shape[:-1], np.uint32)
    for i in range(32 // bits):
        total |= parts[..., i] << np.uint32(bits * i)
    return total.view(np.int32)


def compressed(bits, group=None, *, kind="int", layout="pack-quantized", inputs=None, **weights):
    strategy = "group" if group else "channel"
    scheme = {"num_bits": bits, "type": kind, "symmetric": True, "strategy": strategy, "group_size": group} | weights
    one = {"targets": ["Linear"], "weights": scheme, "input_activations": inputs, "output_activations": None}
    return {"quant_method": "compressed-tensors", "format": layout, "config_groups": {"group_0": one}, "ignore": []}


def packed_tensors(rng, d_out, d_in, bits, group):
    codes, k = rng.integers(-(1 << bits - 1), 1 << bits - 1, (d_out, d_in)), d_in // (group or d_in)
    scale = (rng.uniform(0.5, 1, (d_out, k)) * 0.2 / (1 << bits - 1)).astype(jnp.bfloat16)
    shape = np.array([d_out, d_in], np.int64)
    packed = words(codes + (1 << bits - 1), bits)
    return {"weight_packed": packed, "weight_scale": scale, "weight_shape": shape}, codes * np.repeat(
        scale.astype(np.float64), d_in // k, 1
    )


def w4a16(rng, d_out, d_in):
    return packed_tensors(rng, d_out, d_in, 4, 128)


def w8a16(rng, d_out, d_in):
    return packed_tensors(rng, d_out, d_in, 8, None)


def w4_group32(rng, d_out, d_in):
    return packed_tensors(rng, d_out, d_in, 4, 32)


def fp8_channel(rng, d_out, d_in):
    weight = rng.standard_normal((d_out, d_in)).astype(jnp.float8_e4m3fn)
    scale = rng.uniform(0.05, 0.1, (d_out, 1)).astype(jnp.bfloat16)
    return {"weight": weight, "weight_scale": scale}, weight.astype(np.float64) * scale.astype(np.float64)


def fp8_block(rng, d_out, d_in):
    weight = rng.standard_normal((d_out, d_in)).astype(jnp.float8_e4m3fn)
    scale = rng.uniform(0.05, 0.1, (-(-d_out // 128), -(-d_in // 128))).astype(np.float32)
    wide = np.repeat(np.repeat(scale.astype(np.float64), 128, 0)[:d_out], 128, 1)[:, :d_in]
    return {"weight": weight, "weight_scale_inv": scale}, weight.astype(np.float64) * wide


def gptq(rng, d_out, d_in, order=None):
    codes, zeros = rng.integers(0, 16, (d_in, d_out)), rng.integers(1, 16, (d_in // 128, d_out))
    scales = rng.uniform(0.01, 0.02, (d_in // 128, d_out)).astype(np.float16)
    group = np.arange(d_in) // 128 if order is None else order
    tensors = {
        "qweight": np.ascontiguousarray(words(codes.T, 4).T),
        "qzeros": words(zeros - 1, 4),
        "scales": scales,
        "g_idx": group.astype(np.int32),
    }
    return tensors, ((codes - zeros[group]) * scales.astype(np.float64)[group]).T


def awq(rng, d_out, d_in):
    codes, zeros = rng.integers(0, 16, (d_in, d_out)), rng.integers(0, 16, (d_in // 128, d_out))
    scales = rng.uniform(0.01, 0.02, (d_in // 128, d_out)).astype(np.float16)
    order = [0, 2, 4, 6, 1, 3, 5, 7]  # AutoAWQ's packing: nibble i holds output order[i]

    def pack(values):
        return words(values.reshape(len(values), -1, 8)[..., order].reshape(values.shape), 4)

    group = np.arange(d_in) // 128
    tensors = {"qweight": pack(codes), "qzeros": pack(zeros), "scales": scales}
    return tensors, ((codes - zeros[group]) * scales.astype(np.float64)[group]).T


def nf4(rng, d_out, d_in):
    codes, size = rng.integers(0, 16, d_out * d_in), d_out * d_in // 64
    levels = np.sort(rng.uniform(-1, 1, 256)).astype(np.float32)
    nested, offset = rng.integers(0, 256, size).astype(np.uint8), 0.3
    outer = rng.uniform(0.05, 0.1, -(-size // 256)).astype(np.float32)
    state = {"quant_type": "nf4", "blocksize": 64, "dtype": "bfloat16", "shape": [d_out, d_in]}
    state |= {"nested_blocksize": 256, "nested_dtype": "float32", "nested_offset": offset}
    tensors = {
        "weight": (codes[0::2] << 4 | codes[1::2]).astype(np.uint8)[:, None],
        "weight.absmax": nested,
        "weight.quant_map": NF4,
        "weight.nested_absmax": outer,
        "weight.nested_quant_map": levels,
        "weight.quant_state.bitsandbytes__nf4": np.frombuffer(json.dumps(state).encode(), np.uint8),
    }
    absmax = levels.astype(np.float64)[nested] * np.repeat(outer.astype(np.float64), 256)[:size] + offset
    return tensors, (NF4.astype(np.float64)[codes] * np.repeat(absmax, 64)).reshape(d_out, d_in)


GPTQ = {"quant_method": "gptq", "bits": 4, "group_size": 128, "desc_act": False, "sym": False}
FP8_INPUTS = {"num_bits": 8, "type": "float", "dynamic": True}
# writer, quantization_config, served format, what the warning says (None: no warning, the codes are kept)
FORMATS = {
    "w4a16": (w4a16, compressed(4, 128), "int4", None),
    "w8a16": (w8a16, compressed(8), "int8", None),
    "w4 group 32": (w4_group32, compressed(4, 32), "int8", "rounded again to weights='int8'"),
    "fp8 dynamic": (
        fp8_channel,
        compressed(8, kind="float", layout="float-quantized", inputs=FP8_INPUTS),
        "fp8",
        "it quantises activations (float8), which here keep float32",
    ),
    "fp8 block": (
        fp8_block,
        {"quant_method": "fp8", "fmt": "e4m3", "weight_block_size": [128, 128], "activation_scheme": "dynamic"},
        "fp8",
        "rounded again to weights='fp8'",
    ),
    "gptq": (
        gptq,
        GPTQ,
        "int8",
        "quant_method='gptq': its kernels are dequantised and rounded again to weights='int8'",
    ),
    "awq": (
        awq,
        {"quant_method": "awq", "bits": 4, "group_size": 128, "version": "gemm", "zero_point": True},
        "int8",
        "quant_method='awq': its kernels are dequantised",
    ),
    "nf4": (
        nf4,
        {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4"},
        "int8",
        "quant_method='bitsandbytes': its kernels are dequantised",
    ),
}


@pytest.fixture(scope="module")
def unquantised(make_checkpoint):
    directory, _ = make_checkpoint(
        "llama", num_hidden_layers=1, hidden_size=D, intermediate_size=FFN, num_attention_heads=4, num_key_value_heads=2
    )
    return directory


def write(unquantised, directory, writer, quantization, keep=(), **options):
    """Writes a quantised copy of a checkpoint in two files. Returns each quantised kernel by name, float64."""
    shutil.copytree(unquantised, directory)
    tensors = load_file(directory / "model.safetensors")
    rng, exact = np.random.default_rng(0), {}
    for name in [n for n in tensors if n.endswith("_proj.weight") and n not in keep]:
        parts, exact[name] = writer(rng, *tensors.pop(name).shape, **options)
        tensors |= {name.removesuffix("weight") + part: value for part, value in parts.items()}
    names = sorted(tensors)
    files = {"a.safetensors": names[::2], "b.safetensors": names[1::2]}  # a kernel's parts are in both
    for file, own in files.items():
        save_file({name: np.ascontiguousarray(tensors[name]) for name in own}, directory / file)
    (directory / "model.safetensors").unlink()
    weight_map = {name: file for file, own in files.items() for name in own}
    (directory / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    config = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps(config | {"quantization_config": quantization}))
    return exact


def served(linear) -> np.ndarray:
    codes, scale = (np.asarray(linear[name]).astype(np.float64) for name in ("kernel", "scale"))
    return codes * np.repeat(scale, len(codes) // len(scale), axis=0)


@pytest.mark.parametrize("name", FORMATS)
def test_kernels_have_the_values_that_the_format_defines(name, unquantised, tmp_path):
    writer, quantization, weights, message = FORMATS[name]
    exact = write(unquantised, tmp_path / "model", writer, quantization)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        _, params, config = load_model(tmp_path / "model", "float32", progress=False)
    assert config.weights == weights
    messages = [str(one.message) for one in caught]
    assert len(messages) == (message is not None) and all(message in one for one in messages)
    layer, prefix = params["layers"][0], "model.layers.0."
    for stack, modules in {
        "qkv": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
        "o": ("self_attn.o_proj",),
        "gate_up": ("mlp.gate_proj", "mlp.up_proj"),
        "down": ("mlp.down_proj",),
    }.items():
        expected = np.concatenate([exact[f"{prefix}{module}.weight"] for module in modules]).T
        found = served(layer[stack])
        assert layer[stack]["kernel"].dtype == {"int4": "int4", "int8": "int8", "fp8": "float8_e4m3fn"}[weights]
        if message is None or name == "fp8 dynamic":
            np.testing.assert_allclose(found, expected, rtol=1e-12)
        else:  # rounded again: within half a step, or fp8's relative precision
            half = np.abs(expected).max(0) / 254 if weights == "int8" else np.abs(expected) / 16 + 1e-3
            assert (np.abs(found - expected) <= half * 1.001).all()


def test_quantised_experts_keep_their_codes(make_checkpoint, tmp_path):
    sizes = {"hidden_size": D, "moe_intermediate_size": 128, "head_dim": 64, "num_experts": 3, "num_experts_per_tok": 2}
    plain, _ = make_checkpoint("qwen3_moe", num_hidden_layers=1, **sizes)
    exact = write(plain, tmp_path / "model", w4a16, compressed(4, 128))
    _, params, _ = load_model(tmp_path / "model", "float32", progress=False)
    own = params["layers"][0]["experts"]
    assert own["gate_up"].dtype == own["down"].dtype == "int4"
    for expert in range(3):
        kernels = {
            part: exact[f"model.layers.0.mlp.experts.{expert}.{part}_proj.weight"].T for part in ("gate", "up", "down")
        }
        for name, parts in {"gate_up": ("gate", "up"), "down": ("down",)}.items():
            found = served({"kernel": own[name][expert], "scale": own[f"{name}_scale"][expert]})
            np.testing.assert_allclose(found, np.concatenate([kernels[part] for part in parts], 1), rtol=1e-12)


def test_settings_and_unquantised_kernels_round_to_one_format(unquantised, tmp_path):
    keep = ["model.layers.0.mlp.down_proj.weight"]
    exact = write(unquantised, tmp_path / "model", w4a16, compressed(4, 128), keep)
    with pytest.warns(
        UserWarning, match=re.escape(f"1 of its kernels are not quantised, and are rounded too, e.g. {keep[0]}")
    ):
        _, params, _ = load_model(tmp_path / "model", "float32", progress=False)
    assert params["layers"][0]["down"]["kernel"].dtype == "int4"
    from dataclasses import replace

    config = replace(ModelConfig.from_directory(tmp_path / "model"), weights="int8")
    with pytest.warns(UserWarning, match="rounded again to weights='int8'"):
        _, params, _ = load_model(tmp_path / "model", "float32", progress=False, config=config)
    o = exact["model.layers.0.self_attn.o_proj.weight"].T
    assert (np.abs(served(params["layers"][0]["o"]) - o) <= np.abs(o).max(0) / 254 * 1.001).all()


REFUSED = {
    "unknown method": ({"quant_method": "hqq"}, "quant_method='hqq'"),
    "3 bits": (GPTQ | {"bits": 3}, "bits=3"),
    "asymmetric": (compressed(4, 128, symmetric=False), "weights.symmetric=False"),
    "activations": (compressed(8, layout="int-quantized", inputs={"num_bits": 8, "type": "int"}), "input_activations="),
    "sparse": (compressed(4, 128) | {"sparsity_config": {"format": "sparse-24-bitmask"}}, "sparsity_config.format="),
    "order": (compressed(4, 128, actorder="group"), "weights.actorder='group'"),
    "kv": (compressed(4, 128) | {"kv_cache_scheme": {"num_bits": 8}}, "kv_cache_scheme="),
    "fp4": ({"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "fp4"}, "quant_type='fp4'"),
    "rotated": (compressed(4, 128) | {"transform_config": {"config_groups": {"u": 1}}}, "transform_config="),
    "rules": (GPTQ | {"dynamic": {"-:down": {}}}, "quantization_config.dynamic="),
    "gemv": ({"quant_method": "awq", "bits": 4, "group_size": 128, "version": "gemv"}, "version='gemv'"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_other_formats_are_refused_by_name(case, unquantised):
    config = json.loads((unquantised / "config.json").read_text())
    quantization, message = REFUSED[case]
    with pytest.raises(UnsupportedModelError, match=re.escape("config.json: quantization_config.")) as caught:
        ModelConfig.from_dict(config | {"quantization_config": quantization})
    assert message in str(caught.value) and "supported:" in str(caught.value)


def test_gptq_in_another_order_of_inputs_is_refused(unquantised, tmp_path):
    write(unquantised, tmp_path / "model", lambda rng, o, i: gptq(rng, o, i, np.arange(i) % (i // 128)), GPTQ)
    with (
        warnings.catch_warnings(action="ignore"),
        pytest.raises(CheckpointError, match=r"_proj: g_idx: .*desc_act=true"),
    ):
        load_model(tmp_path / "model", "float32", progress=False)


def test_gptq_without_the_order_that_its_config_announces_is_refused(unquantised, tmp_path):
    def without_order(rng, d_out, d_in):
        tensors, kernel = gptq(rng, d_out, d_in)
        del tensors["g_idx"]
        return tensors, kernel

    write(unquantised, tmp_path / "model", without_order, GPTQ | {"desc_act": True})
    with (
        warnings.catch_warnings(action="ignore"),
        pytest.raises(CheckpointError, match=r"_proj\.g_idx is missing"),
    ):
        load_model(tmp_path / "model", "float32", progress=False)
