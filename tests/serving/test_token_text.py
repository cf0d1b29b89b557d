"""Names and bytes of tokens, and their offsets in a text."""

from types import SimpleNamespace

import pytest
from byte_level import BYTE_CHARS, byte_fallback_backend, train_tokenizer
from tokenizers import AddedToken

from slora_jax.engine.outputs import Delta, TokenLogprobs
from slora_jax.serving.http.shapes import CompletionShape
from slora_jax.serving.http.token_text import TokenText

EMOJI = "🙂".encode()


@pytest.fixture(params=["byte-level", "byte-fallback"])
def backend(request):
    made = train_tokenizer() if request.param == "byte-level" else byte_fallback_backend()
    made.add_special_tokens([AddedToken("<|end|>", special=True)])
    return made


def byte_tokens(backend, data: bytes) -> list[int]:
    names = [(BYTE_CHARS[byte], f"<0x{byte:02X}>") for byte in data]
    return [next(id for name in pair if (id := backend.token_to_id(name)) is not None) for pair in names]


def test_parts_of_a_character_have_distinct_bytes_and_names(backend) -> None:
    text, tokens = TokenText(SimpleNamespace(backend_tokenizer=backend)), byte_tokens(backend, EMOJI)
    assert b"".join(text.raw(token) for token in tokens) == EMOJI
    assert [text.name(token) for token in tokens] == [f"bytes:\\x{byte:02x}" for byte in EMOJI]
    end = backend.token_to_id("<|end|>")
    assert text.name(end) == "<|end|>" and text.is_special(end) and not text.is_special(tokens[0])


def test_bytes_of_tokens_join_to_the_text(backend) -> None:
    text = TokenText(SimpleNamespace(backend_tokenizer=backend))
    for word in ("the the a", "b.the é猫🙂"):
        ids = backend.encode(word).ids if backend.token_to_id("<unk>") is None else None
        if ids is None:  # the byte-fallback vocabulary has no merges: these are its pieces
            ids = [backend.token_to_id(piece) for piece in ("▁the", "▁a", "b", "猫")]
            word = " the ab猫"
        assert b"".join(text.raw(token) for token in ids).decode() == word


def test_tokens_with_the_same_text_keep_their_values() -> None:
    text = TokenText(SimpleNamespace(backend_tokenizer=byte_fallback_backend()))
    b, byte_b = (text._backend.token_to_id(name) for name in ("b", "<0x62>"))
    assert text.name(b) == text.name(byte_b) == "b"
    assert text.values(((byte_b, -0.5), (b, -1.0))) == {f"token_id:{b}": -1.0, "b": -0.5}


def test_offsets_follow_the_text(backend) -> None:
    def offsets(echo: str, text: str, tokens: list[int]) -> list[int]:
        text_of = TokenText(SimpleNamespace(backend_tokenizer=backend))
        shape = CompletionShape("m", text_of, [byte_tokens(backend, echo.encode())], echoes=[echo], logprobs=True)
        scores = [TokenLogprobs(-1.0, ((token, -1.0),)) for token in tokens]
        return shape.piece(0, Delta("", tokens, text, logprobs=scores))["logprobs"]["text_offset"]

    emoji, xy, end = byte_tokens(backend, EMOJI), byte_tokens(backend, b"xy"), backend.token_to_id("<|end|>")
    assert offsets("ab", "🙂xy", [*emoji, *xy, end]) == [2, 2, 2, 2, 3, 4, 5]
    assert offsets("", "\ufffdxy", [emoji[0], *xy]) == [0, 1, 2]
