"""A small byte-level BPE tokenizer, like those of Llama 3 and Qwen: tokens may end within a character."""

import random

from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from tokenizers.trainers import BpeTrainer

SENTENCES = [
    "The quick brown fox jumps over the lazy dog.",
    "Un œuf coûte cinq € à l'épicerie du coin.",
    "猫は窓のそばで眠っている。\n猫は走る。",
    "🙂🙃 emoji take four bytes 👩‍🚀, sometimes more 🏳️‍🌈.",
]
VOCAB_SIZE = 320

PRINTABLE = [*range(33, 127), *range(161, 173), *range(174, 256)]
BYTE_CHARS = {byte: chr(byte) for byte in PRINTABLE}  # the byte-level alphabet: printable stand-ins for all bytes
BYTE_CHARS |= {byte: chr(256 + i) for i, byte in enumerate(b for b in range(256) if b not in BYTE_CHARS)}


def train_tokenizer() -> Tokenizer:
    """`<s>` is token 0, `</s>` token 1; exactly `VOCAB_SIZE` tokens."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=["<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(SENTENCES * 3, trainer)
    assert tokenizer.get_vocab_size() == VOCAB_SIZE
    return tokenizer


def split_anywhere(tokenizer: Tokenizer, text: str, seed: int) -> list[int]:
    """Returns ids of `text` split at random places between bytes, so that tokens end within characters too."""
    rng, ids, at = random.Random(seed), [], 0
    chars = "".join(BYTE_CHARS[byte] for byte in text.encode())
    while at < len(chars):
        end = min(at + rng.choice([1, 1, 2, 3, 5]), len(chars))
        while (token := tokenizer.token_to_id(chars[at:end])) is None:
            end -= 1
        ids.append(token)
        at = end
    return ids


def byte_fallback_backend() -> Tokenizer:
    """Returns a tokenizer like Llama 2's and Mistral's: `<0xNN>` tokens are bytes, and runs of them are decoded
    together."""
    tokens = ["<unk>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁", "▁the", "▁a", "b", "猫", "."]
    vocab = {token: index for index, token in enumerate(tokens)}
    backend = Tokenizer(models.BPE(vocab=vocab, merges=[], byte_fallback=True, unk_token="<unk>"))
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    backend.decoder = decoders.Sequence(steps)
    return backend
