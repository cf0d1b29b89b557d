"""The decoder agrees with transformers in every family, on sequences packed into one ragged list."""

import numpy as np
import pytest
import torch

from slora_jax.models import load_model

LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 500.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 24,
}
LINEAR_ROPE = {"rope_type": "linear", "rope_theta": 1000.0, "factor": 3.0}
CASES = {
    "llama-mha-untied": ("llama", {"num_key_value_heads": 4}),
    "llama-gqa-tied": ("llama", {"num_key_value_heads": 1, "tie_word_embeddings": True}),
    "llama-wide-heads": ("llama", {"head_dim": 32}),
    "llama-biases": ("llama", {"attention_bias": True, "mlp_bias": True}),
    "llama-llama3-rope": ("llama", {"rope_parameters": LLAMA3_ROPE}),
    "llama-linear-rope": ("llama", {"rope_parameters": LINEAR_ROPE}),
    "mistral": ("mistral", {"sliding_window": None, "rms_norm_eps": 1e-5}),
    "qwen2": ("qwen2", {"rope_parameters": {"rope_type": "default", "rope_theta": 1e6}}),
    "qwen2-tied": ("qwen2", {"tie_word_embeddings": True}),
    "qwen3": ("qwen3", {"head_dim": 32}),
    "qwen3-biases": ("qwen3", {"head_dim": 32, "attention_bias": True, "tie_word_embeddings": True}),
}


def prompts(vocab_size: int = 96) -> list[np.ndarray]:
    rng = np.random.default_rng(7)
    return [rng.integers(0, vocab_size, length) for length in (48, 1, 17)]


def reference_logits(model: torch.nn.Module) -> np.ndarray:
    with torch.no_grad():
        return np.concatenate([model(torch.from_numpy(p)[None]).logits[0].numpy() for p in prompts()])


@pytest.mark.parametrize("case", CASES)
def test_float32_logits_match_transformers(case, make_checkpoint, decoder_logits):
    family, overrides = CASES[case]
    directory, model = make_checkpoint(family, **overrides)
    graphdef, params, config = load_model(directory, "float32", progress=False)
    assert config.family == family
    expected, found = reference_logits(model), decoder_logits(graphdef, params, prompts())
    assert np.abs(expected).max() > 1.0
    assert np.abs(found - expected).max() <= 1e-5 * np.abs(expected).max()


def test_sharded_files_give_the_same_parameters_as_one_file(make_checkpoint, tiny_checkpoint):
    single, _ = make_checkpoint("llama")
    one, many = (load_model(path, "float32", progress=False)[1] for path in (single, tiny_checkpoint))
    for stack in ("qkv", "o", "gate_up", "down"):
        for layer in (0, 1):
            kernels = [np.asarray(params["layers"][layer][stack]["kernel"]) for params in (one, many)]
            np.testing.assert_array_equal(*kernels)
    assert one["layers"][0]["qkv"]["kernel"].shape == (64, 64 + 2 * 32)
    assert one["layers"][0]["gate_up"]["kernel"].shape == (64, 2 * 112)


def test_bfloat16_logits_are_close(make_checkpoint, decoder_logits):
    directory, model = make_checkpoint("qwen3")
    graphdef, params, _ = load_model(directory, "bfloat16", progress=False)
    assert params["layers"][0]["qkv"]["kernel"].dtype == "bfloat16"
    assert params["layers"][0]["input_norm"]["scale"].dtype == "float32"
    expected, found = reference_logits(model), decoder_logits(graphdef, params, prompts())
    assert found.dtype == np.float32
    error = np.abs(found - expected)
    assert error.max() <= 0.1 * np.abs(expected).max()
    assert error.mean() <= 0.02 * np.abs(expected).max()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_checkpoints_are_cast_on_load(dtype, make_checkpoint, tmp_path):
    _, model = make_checkpoint("qwen2")
    model.to(dtype).save_pretrained(tmp_path)
    _, params, _ = load_model(tmp_path, "float32", progress=False)
    expected = model.model.layers[1].self_attn.o_proj.weight.detach().float().numpy()
    np.testing.assert_array_equal(params["layers"][1]["o"]["kernel"].T, expected)
