"""The decoder agrees with transformers in every family, on sequences packed into one ragged list."""

import json

import jax
import numpy as np
import pytest
import torch
from safetensors.numpy import load_file, save_file

from slora_jax.models import abstract_decoder, load_model

LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 500.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 24,
}
LINEAR_ROPE = {"rope_type": "linear", "rope_theta": 1000.0, "factor": 3.0}
YARN_ROPE = {"rope_type": "yarn", "rope_theta": 1000.0, "factor": 4.0, "original_max_position_embeddings": 32}
LONGROPE = {
    "rope_type": "longrope",
    "rope_theta": 1000.0,
    "short_factor": [1.0, 1.1, 1.2, 1.4, 1.5, 1.6, 1.7, 1.8],
    "long_factor": [1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0, 8.0],
}
GEMMA3_ROPES = {
    "full_attention": {"rope_type": "linear", "rope_theta": 1e5, "factor": 8.0},
    "sliding_attention": {"rope_type": "default", "rope_theta": 1e3},
}
MULTIPLIERS = {
    "attention_multiplier": 0.2, "embedding_multiplier": 12.0, "residual_multiplier": 0.3, "logits_scaling": 1.5,
}  # fmt: skip
CASES = {
    "llama-mha-untied": ("llama", {"num_key_value_heads": 4}),
    "llama-gqa-tied": ("llama", {"num_key_value_heads": 1, "tie_word_embeddings": True}),
    "llama-wide-heads": ("llama", {"head_dim": 32}),
    "llama-biases": ("llama", {"attention_bias": True, "mlp_bias": True}),
    "llama-llama3-rope": ("llama", {"rope_parameters": LLAMA3_ROPE}),
    "llama-linear-rope": ("llama", {"rope_parameters": LINEAR_ROPE}),
    "llama-yarn-rope": ("llama", {"rope_parameters": YARN_ROPE}),
    "llama-yarn-mscale-rope": ("llama", {"rope_parameters": {**YARN_ROPE, "mscale": 0.7, "mscale_all_dim": 0.9}}),
    "llama-dynamic-rope": ("llama", {"rope_parameters": {**LINEAR_ROPE, "rope_type": "dynamic"}}),
    "mistral-window": ("mistral", {"sliding_window": 9}),
    "qwen2-window-in-one-layer": (
        "qwen2",
        {"use_sliding_window": True, "sliding_window": 9, "max_window_layers": 1},
    ),
    "gemma2": (
        "gemma2",
        {
            "head_dim": 16,
            "query_pre_attn_scalar": 24,
            "sliding_window": 9,
            "attn_logit_softcapping": 4.0,
            "final_logit_softcapping": 3.0,
        },
    ),
    "gemma3": (
        "gemma3_text",
        {
            "head_dim": 16,
            "num_hidden_layers": 3,
            "sliding_window": 9,
            "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
            "rope_parameters": GEMMA3_ROPES,
        },
    ),
    "phi3-partial-rope": ("phi3", {"sliding_window": 9, "rope_parameters": {"partial_rotary_factor": 0.75}}),
    "phi3-longrope": ("phi3", {"rope_parameters": LONGROPE, "original_max_position_embeddings": 128}),
    "smollm3": ("smollm3", {"num_hidden_layers": 4}),
    "granite": ("granite", {**MULTIPLIERS, "attention_bias": True}),
    "olmo2": ("olmo2", {}),
    "glm4": ("glm4", {"head_dim": 16}),
    "mixtral": ("mixtral", {"num_local_experts": 5, "sliding_window": 9}),
    "qwen3-moe": (
        "qwen3_moe",
        {
            "head_dim": 16,
            "num_hidden_layers": 3,
            "num_experts": 6,
            "num_experts_per_tok": 3,
            "moe_intermediate_size": 24,
            "mlp_only_layers": [1],
        },
    ),
    "mistral": ("mistral", {"sliding_window": None, "rms_norm_eps": 1e-5}),
    "qwen2": ("qwen2", {"rope_parameters": {"rope_type": "default", "rope_theta": 1e6}}),
    "qwen2-tied": ("qwen2", {"tie_word_embeddings": True}),
    "qwen3": ("qwen3", {"head_dim": 32}),
    "qwen3-biases": ("qwen3", {"head_dim": 32, "attention_bias": True, "tie_word_embeddings": True}),
}


ONE_OF_EACH_FAMILY = {family: case for case, (family, _) in reversed(CASES.items())}.values()


def prompts(vocab_size: int = 96) -> list[np.ndarray]:
    rng = np.random.default_rng(7)
    return [rng.integers(0, vocab_size, length) for length in (48, 1, 17)]


def reference_logits(model: torch.nn.Module) -> np.ndarray:
    with torch.no_grad():
        return np.concatenate([model(torch.from_numpy(p)[None]).logits[0].float().numpy() for p in prompts()])


@pytest.mark.parametrize("case", CASES)
def test_float32_logits_match_transformers(case, make_checkpoint, decoder_logits):
    family, overrides = CASES[case]
    directory, model = make_checkpoint(family, **overrides)
    graphdef, params, config = load_model(directory, "float32", progress=False)
    assert config.family == family
    expected, found = reference_logits(model), decoder_logits(graphdef, params, prompts())
    assert np.abs(expected).max() > 1.0
    assert np.abs(found - expected).max() <= 1e-5 * np.abs(expected).max()


def test_longrope_takes_the_factors_of_the_longest_sequence(make_checkpoint, decoder_logits):
    """transformers takes the long factors for each sequence that is longer than the original length."""
    overrides = {"rope_parameters": LONGROPE, "original_max_position_embeddings": 32}
    directory, model = make_checkpoint("phi3", **overrides)
    graphdef, params, config = load_model(directory, "float32", progress=False)
    short = abstract_decoder(config.up_to(32), "float32")[0]
    for graph, prompt in ((graphdef, prompts()[0]), (short, prompts()[2])):
        with torch.no_grad():
            expected = model(torch.from_numpy(prompt)[None]).logits[0].numpy()
        found = decoder_logits(graph, params, [prompt])
        assert np.abs(found - expected).max() <= 1e-5 * np.abs(expected).max()


def test_text_model_of_a_larger_checkpoint_is_loaded_alone(make_checkpoint, tmp_path):
    source, _ = make_checkpoint("gemma3_text", head_dim=16)
    tensors = {f"language_model.{name}": one for name, one in load_file(source / "model.safetensors").items()}
    images = {"vision_tower.embed.weight": np.ones((2, 2), np.float32)}
    save_file(tensors | images, tmp_path / "model.safetensors")
    text = json.loads((source / "config.json").read_text())
    outer = {"model_type": "gemma3", "architectures": ["Gemma3ForConditionalGeneration"], "eos_token_id": [1, 106]}
    (tmp_path / "config.json").write_text(json.dumps({**outer, "text_config": text, "vision_config": {"a": 1}}))
    _, alone, _ = load_model(source, "float32", progress=False)
    _, params, config = load_model(tmp_path, "float32", progress=False)
    assert (config.family, config.eos_token_ids) == ("gemma3", (1, 106))
    jax.tree.map(np.testing.assert_array_equal, params, alone)


def test_sharded_files_give_the_same_parameters_as_one_file(make_checkpoint, tiny_checkpoint):
    single, _ = make_checkpoint("llama")
    one, many = (load_model(path, "float32", progress=False)[1] for path in (single, tiny_checkpoint))
    for stack in ("qkv", "o", "gate_up", "down"):
        for layer in (0, 1):
            kernels = [np.asarray(params["layers"][layer][stack]["kernel"]) for params in (one, many)]
            np.testing.assert_array_equal(*kernels)
    assert one["layers"][0]["qkv"]["kernel"].shape == (64, 64 + 2 * 32)
    assert one["layers"][0]["gate_up"]["kernel"].shape == (64, 2 * 112)


@pytest.mark.parametrize("case", ONE_OF_EACH_FAMILY)
def test_bfloat16_logits_are_as_exact_as_those_of_transformers(case, make_checkpoint, decoder_logits):
    """Both are compared with float32 logits of the same weights. Measured: a median token has 0.7 to 1.0 of
    transformers' error. A token whose router scores round to other experts has any error, here and there."""
    family, overrides = CASES[case]
    directory, model = make_checkpoint(family, rounded=True, **overrides)
    graphdef, params, config = load_model(directory, "bfloat16", progress=False)
    assert params["layers"][0]["qkv"]["kernel"].dtype == "bfloat16"
    assert params["norm"]["scale"].dtype == "float32"
    found, exact = decoder_logits(graphdef, params, prompts()), reference_logits(model)
    for weight in model.parameters():
        weight.data = weight.data.bfloat16()
    theirs = reference_logits(model)
    assert found.dtype == np.float32
    errors, their_errors = (np.sqrt(np.square(logits - exact).mean(-1)) for logits in (found, theirs))  # [tokens]
    assert np.median(their_errors) > 1e-3 * np.abs(exact).max()
    assert np.median(errors) <= 1.1 * np.median(their_errors)
    if config.experts is None:
        assert np.abs(found - exact).max() <= 1.5 * np.abs(theirs - exact).max()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_checkpoints_are_cast_on_load(dtype, make_checkpoint, tmp_path):
    _, model = make_checkpoint("qwen2")
    model.to(dtype).save_pretrained(tmp_path)
    _, params, _ = load_model(tmp_path, "float32", progress=False)
    expected = model.model.layers[1].self_attn.o_proj.weight.detach().float().numpy()
    np.testing.assert_array_equal(params["layers"][1]["o"]["kernel"].T, expected)
