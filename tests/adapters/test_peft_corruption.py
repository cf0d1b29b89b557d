"""Each way in which an adapter's files can be wrong is refused with file, tensor, expected and found."""

import json
import struct

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from slora_jax.adapters import BaseGeometry, random_adapter, read_peft, write_peft
from slora_jax.errors import AdapterError

Q0_A = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"
Q0_B = "base_model.model.model.layers.0.self_attn.q_proj.lora_B.weight"


@pytest.fixture
def directory(tmp_path, geometry):
    return write_peft(tmp_path / "adapter", random_adapter(geometry, 4, targets=["q", "v", "down"]))


def refused(directory, geometry, *parts):
    with pytest.raises(AdapterError) as caught:
        read_peft(directory, geometry)
    message = str(caught.value)
    for part in (str(directory), *parts):
        assert part in message, message


def edit_tensors(directory, change):
    path = directory / "adapter_model.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path)


def edit_config(directory, **fields):
    path = directory / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


def raw_safetensors(directory, header, body=b"", length=None):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    prefix = struct.pack("<Q", len(text) if length is None else length)
    (directory / "adapter_model.safetensors").write_bytes(prefix + text + body)


def test_untouched_directory_is_read(directory, geometry):
    assert read_peft(directory, geometry).ranks.tolist() == [[4, 0, 4, 0, 0, 0, 4]] * 3


def test_pickle_only_is_refused_with_the_reason(directory, geometry):
    (directory / "adapter_model.safetensors").rename(directory / "adapter_model.bin")
    refused(directory, geometry, "adapter_model.bin", "arbitrary code", "safe_serialization=True")


def test_missing_weights_are_refused(directory, geometry):
    (directory / "adapter_model.safetensors").unlink()
    refused(directory, geometry, "adapter_model.safetensors: no such file")


def test_missing_directory_is_refused(directory, geometry):
    refused(directory / "nowhere", geometry, "adapter_config.json: no such file")


@pytest.mark.parametrize(("tensor", "shape"), [(Q0_A, "[4, 24], found [4, 25]"), (Q0_B, "[32, 4], found [33, 4]")])
def test_shape_of_another_base_model_is_refused(directory, geometry, tensor, shape):
    rows, columns = (0, 1) if tensor == Q0_A else (1, 0)
    edit_tensors(directory, lambda t: t.update({tensor: np.pad(t[tensor], [(0, rows), (0, columns)])}))
    refused(directory, geometry, tensor, f"expected shape {shape}", "probably trained on another base model")


def test_adapter_of_a_wider_or_deeper_base_model_is_refused(tmp_path, geometry):
    widths = {"hidden_size": 24, "q_width": 32, "kv_width": 16, "intermediate_size": 40, "page_size": 8}
    deeper = BaseGeometry(num_layers=4, **widths)
    write_peft(tmp_path / "deeper", random_adapter(deeper, 4))
    refused(tmp_path / "deeper", geometry, "layers.3.", "3 layers", "another base model")
    wider = BaseGeometry(num_layers=3, **widths | {"hidden_size": 48})
    write_peft(tmp_path / "wider", random_adapter(wider, 4))
    refused(tmp_path / "wider", geometry, "expected shape [4, 24], found [4, 48]", "another base model")


@pytest.mark.parametrize("tensor", [Q0_A, Q0_B])
def test_rank_other_than_the_configs_is_refused(directory, geometry, tensor):
    axis = 0 if tensor == Q0_A else 1
    edit_tensors(directory, lambda t: t.update({tensor: np.ascontiguousarray(np.delete(t[tensor], 0, axis))}))
    refused(directory, geometry, tensor, "says rank 4, the tensor has rank 3")


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16])
def test_value_that_is_not_finite_is_refused(directory, geometry, value, dtype):
    def change(tensors):
        tensors[Q0_B] = tensors[Q0_B].astype(dtype)
        tensors[Q0_B][31, 3] = value

    edit_tensors(directory, change)
    refused(directory, geometry, Q0_B, "found NaN or infinity")


@pytest.mark.parametrize("tensor", [Q0_A, Q0_B])
def test_missing_tensor_of_a_targeted_module_is_refused(directory, geometry, tensor):
    edit_tensors(directory, lambda t: t.pop(tensor))
    refused(directory, geometry, f"missing tensor {tensor!r}")


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("base_model.model.model.layers.0.self_attn.q_proj.lora_magnitude_vector", "a DoRA magnitude"),
        ("base_model.model.model.layers.0.self_attn.q_proj.lora_magnitude_vector.weight", "a DoRA magnitude"),
        ("base_model.model.model.embed_tokens.lora_embedding_A", "LoRA on an embedding"),
        ("base_model.model.model.embed_tokens.weight", "an embedding"),
        ("base_model.model.lm_head.lora_A.weight", "the output head"),
        ("base_model.model.model.layers.0.self_attn.q_proj.lora_B.bias", "a bias"),
        ("base_model.model.model.layers.0.self_attn.q_proj.bias", "a bias"),
        ("base_model.model.model.layers.0.self_attn.qkv_proj.lora_A.weight", "no known LoRA weight"),
        ("base_model.model.model.layers.00.self_attn.q_proj.lora_A.weight", "no known LoRA weight"),
        ("base_model.model.model.layers.-1.self_attn.q_proj.lora_A.weight", "no known LoRA weight"),
        ("", "no known LoRA weight"),
        (
            "base_model.model.model.vision_tower.encoder.layers.0.self_attn.q_proj.lora_A.weight",
            "expected the prefix 'base_model.model.model.layers.', "
            "found 'base_model.model.model.vision_tower.encoder.'",
        ),
        (
            "lora_te_text_model_encoder_layers_0_self_attn_q_proj.lora_down.weight",
            "expected the prefix 'base_model.model.model.layers.', found 'lora_te_text_model",
        ),
        ("base_model.model.model.layers.3.self_attn.q_proj.lora_A.weight", "another base model"),
        ("base_model.model.model.layers.99999.self_attn.q_proj.lora_A.weight", "another base model"),
        ("base_model.model.model.layers.0.self_attn.k_proj.lora_A.weight", "does not target this module"),
        ("base_model.model.model.layers.0.self_attn.q_proj.lora_A.other.weight", "the same weight twice"),
        ("model.layers.0.self_attn.q_proj.lora_A.weight", "the same weight twice"),
        ("base_model.model.model.language_model.layers.0.self_attn.q_proj.lora_A.weight", "the same weight twice"),
    ],
)
def test_unexpected_tensor_is_refused(directory, geometry, name, reason):
    edit_tensors(directory, lambda t: t.update({name: np.zeros((4, 24), np.float32)}))
    refused(directory, geometry, repr(name), reason)


def test_the_first_of_many_unexpected_tensors_are_named(directory, geometry):
    edit_tensors(directory, lambda t: t.update({f"x.{i}": np.zeros(1, np.float32) for i in range(9)}))
    refused(directory, geometry, "unexpected tensor 'x.0' (and 8 more: 'x.1', 'x.2', ...)")


def test_layers_of_two_modules_are_refused(directory, geometry):
    other = Q0_A.replace("model.layers", "model.language_model.layers")
    edit_tensors(directory, lambda t: t.update({other: t.pop(Q0_A)}))
    refused(directory, geometry, repr(other), "different modules")


@pytest.mark.parametrize("dtype", [np.float64, np.int8, np.int32])
def test_other_element_types_are_refused(directory, geometry, dtype):
    edit_tensors(directory, lambda t: t.update({Q0_A: t[Q0_A].astype(dtype)}))
    refused(directory, geometry, Q0_A, "expected F16, BF16, F32, found ")


@pytest.mark.parametrize("shape", [(96,), (4, 24, 1), ()])
def test_tensor_that_is_not_a_matrix_is_refused(directory, geometry, shape):
    edit_tensors(directory, lambda t: t.update({Q0_A: np.zeros(shape, np.float32)}))
    refused(directory, geometry, Q0_A, "expected shape [4, 24]", f"found {[*shape]}")


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"r": 0}, "r: rank must be an integer in 1..256, found 0"),
        ({"r": 300}, "r: rank must be an integer in 1..256, found 300"),
        ({"use_dora": True}, "use_dora: DoRA"),
        ({"bias": "all"}, "bias: only 'none'"),
        ({"target_modules": ["c_attn"]}, "matches no projection"),
        ({"target_modules": ["q_proj", "lm_head"]}, "'lm_head'"),
        ({"peft_type": "IA3"}, "peft_type"),
    ],
)
def test_config_errors_name_the_file_and_the_field(directory, geometry, fields, message):
    edit_config(directory, **fields)
    refused(directory, geometry, "adapter_config.json", message)


def test_target_added_to_the_config_without_weights_is_refused(directory, geometry):
    edit_config(directory, target_modules=["q_proj", "v_proj", "down_proj", "o_proj"])
    refused(directory, geometry, "missing tensor", "layers.0.self_attn.o_proj.lora_A.weight")


ONE = {"dtype": "F32", "shape": [4, 24], "data_offsets": [0, 384]}


@pytest.mark.parametrize(
    ("header", "body", "length"),
    [
        (b"", b"", 0),
        (b"{}", b"", 1 << 62),
        (b"{not json", b"", None),
        (b"[1, 2, 3]", b"", None),
        (b"[" * 100_000, b"", None),
        ({Q0_A: ONE | {"shape": [1 << 40, 1 << 40]}}, bytes(384), None),
        ({Q0_A: ONE | {"shape": [1 << 30, 24]}}, bytes(384), None),
        ({Q0_A: ONE | {"shape": [-4, -24]}}, bytes(384), None),
        ({Q0_A: ONE | {"data_offsets": [0, 1 << 50]}}, bytes(384), None),
        ({Q0_A: ONE | {"data_offsets": [384, 0]}}, bytes(384), None),
        ({Q0_A: ONE, Q0_B: ONE}, bytes(384), None),
        ({Q0_A: ONE}, bytes(383), None),
        ({Q0_A: ONE}, bytes(385), None),
    ],
)
def test_hostile_header_is_refused(directory, geometry, header, body, length):
    raw_safetensors(directory, header, body, length)
    refused(directory, geometry, "adapter_model.safetensors: not a valid safetensors file")


@pytest.mark.parametrize("keep", [0, 4, 100, 0.5, 0.99])
def test_truncated_file_is_refused(directory, geometry, keep):
    path = directory / "adapter_model.safetensors"
    content = path.read_bytes()
    path.write_bytes(content[: int(keep * len(content)) if isinstance(keep, float) else keep])
    refused(directory, geometry, "not a valid safetensors file")


def test_empty_file_of_weights_is_refused(directory, geometry):
    raw_safetensors(directory, {})
    refused(directory, geometry, f"missing tensor {Q0_A!r}")
