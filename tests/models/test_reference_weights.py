"""The demo's check reads GGUF files with its own code: it has the weights of the file and finds wrong tokens."""

import numpy as np
import pytest
import torch
from gguf_files import permuted, quantised, write_model
from transformers import LlamaConfig, LlamaForCausalLM

from slora_jax.demo.reference_weights import read_reference
from slora_jax.demo.verify import dense_logits, first_difference
from slora_jax.errors import UnsupportedModelError

PROMPT = [5, 70, 33, 121, 6]


@pytest.fixture(scope="module", params=[True, False], ids=["tied", "untied"])
def model(request) -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=128,
        hidden_size=96,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=6,
        num_key_value_heads=2,
        rope_parameters={"rope_type": "default", "rope_theta": 100000.0},
        tie_word_embeddings=request.param,
    )
    return LlamaForCausalLM(config).eval()


@pytest.fixture(scope="module")
def file(model, tmp_path_factory):
    path = tmp_path_factory.mktemp("gguf") / "model.gguf"
    state = write_model(path, model, kind=lambda name: "Q8_0", metadata={"tokenizer.ggml.eot_token_id": 7})
    model.load_state_dict(state, strict=False)  # a tied head is not in the file
    return path


def greedy(file, count: int) -> list[int]:
    weights, config = read_reference(file)
    tokens = list(PROMPT)
    for _ in range(count):
        tokens.append(int(dense_logits(weights, config, tokens, first=len(tokens) - 1)[0].argmax()))
    return tokens[len(PROMPT) :]


def test_logits_from_a_gguf_file_are_those_of_transformers(model, file):
    weights, config = read_reference(file)
    with torch.no_grad():
        expected = model(torch.tensor([PROMPT])).logits[0].numpy()
    logits = dense_logits(weights, config, PROMPT)
    assert logits.dtype == np.float32
    np.testing.assert_allclose(logits, expected, atol=1e-5 * np.abs(expected).max())
    np.testing.assert_allclose(dense_logits(weights, config, PROMPT, first=3), logits[3:], atol=1e-6)
    assert config["eos_token_id"] == [2, 7]


def test_either_end_token_ends_an_answer(file):
    weights, config = read_reference(file)
    answer = greedy(file, 1)
    for ends in ([answer[0], 127], [127, answer[0]]):
        assert first_difference(weights, config | {"eos_token_id": ends}, PROMPT, answer, max_tokens=9) is None
    assert first_difference(weights, config | {"eos_token_id": [127]}, PROMPT, answer, max_tokens=9).position == 1


def test_a_wrong_token_is_found(file):
    weights, config = read_reference(file)
    answer = greedy(file, 4)
    wrong = [*answer[:2], (answer[2] + 1) % 128, answer[3]]
    assert first_difference(weights, config, PROMPT, answer, max_tokens=4) is None
    assert first_difference(weights, config, PROMPT, wrong, max_tokens=4).position == 2


def test_permuted_rows_of_q_change_the_logits(model, file, tmp_path):
    rng, q = np.random.default_rng(0), model.state_dict()["model.layers.0.self_attn.q_proj.weight"].numpy()
    twice = quantised(permuted(permuted(q, 6), 6), "Q8_0", rng)
    write_model(tmp_path / "model.gguf", model, lambda name: "Q8_0", tensors={"blk.0.attn_q.weight": (twice, "Q8_0")})
    weights, config = read_reference(tmp_path / "model.gguf")
    expected = dense_logits(*read_reference(file), PROMPT)
    assert np.abs(dense_logits(weights, config, PROMPT) - expected).max() > 1e-3 * np.abs(expected).max()


def test_another_architecture_is_refused(model, tmp_path):
    write_model(tmp_path / "model.gguf", model, architecture="qwen2")
    with pytest.raises(UnsupportedModelError, match="qwen2"):
        read_reference(tmp_path / "model.gguf")
