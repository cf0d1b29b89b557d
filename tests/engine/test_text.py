"""Streamed text equals decoded text, ends at the first stop string, and only grows."""

from collections.abc import Sequence

import pytest
from byte_level import BYTE_CHARS, SENTENCES, byte_fallback_backend, split_anywhere, train_tokenizer
from hypothesis import assume, given
from hypothesis import strategies as st
from tokenizers import Tokenizer

from slora_jax.engine.text import TextStream


class FastTokenizer:
    """The part of a Hugging Face tokenizer that `TextStream` uses."""

    def __init__(self, backend: Tokenizer) -> None:
        self.backend_tokenizer = backend

    def decode(self, ids: list[int]) -> str:
        return self.backend_tokenizer.decode(ids, skip_special_tokens=True)

    def split(self, text: str, seed: int) -> list[int]:
        return split_anywhere(self.backend_tokenizer, text, seed)


TOKENIZER = FastTokenizer(train_tokenizer())
BYTE_FALLBACK = FastTokenizer(byte_fallback_backend())
SIZE = TOKENIZER.backend_tokenizer.get_vocab_size()
texts = st.one_of(st.text(max_size=40), st.text(alphabet="ab .é€猫🙂", max_size=40), st.sampled_from(SENTENCES))
seeds = st.integers(0, 2**32)


def stream(
    ids: list[int],
    stop: tuple[str, ...] = (),
    tokenizer: FastTokenizer = TOKENIZER,
    prompt: Sequence[int] = (),
) -> tuple[TextStream, list[str]]:
    """Pushes ids up to a stop string. Returns the stream, and the pieces taken after each token and at the end."""
    text = TextStream(tokenizer, stop, prompt)
    pieces = []
    for token in ids:
        stopped = text.push(token)
        if stopped:
            break
        pieces.append(text.take())
    text.finish()
    pieces.append(text.take(last=True))
    return text, pieces


@given(texts, seeds)
def test_any_split_of_any_text_streams_to_the_same_text(text: str, seed: int) -> None:
    ids = TOKENIZER.split(text, seed)
    assert TOKENIZER.decode(ids) == text
    result, pieces = stream(ids)
    assert result.text == "".join(pieces) == text


@given(st.lists(st.integers(0, SIZE - 1), max_size=30))
def test_tokens_that_are_no_valid_utf8_stream_to_what_the_tokenizer_decodes(ids: list[int]) -> None:
    result, pieces = stream(ids)
    assert result.text == "".join(pieces) == TOKENIZER.decode(ids)


@given(st.booleans(), st.lists(st.integers(0, 261), max_size=80), st.lists(st.integers(0, 261), max_size=12))
def test_text_is_what_the_output_adds_to_the_prompts(byte_level: bool, prompt: list[int], ids: list[int]) -> None:
    tokenizer = TOKENIZER if byte_level else BYTE_FALLBACK
    size = tokenizer.backend_tokenizer.get_vocab_size()
    prompt, ids = [token % size for token in prompt], [token % size for token in ids]
    before, whole = tokenizer.decode(prompt), tokenizer.decode(prompt + ids)
    assume(not before.endswith("\ufffd") and whole.startswith(before))
    if not byte_level:
        assume("\ufffd" not in whole[len(before) :])  # a run of bytes reads as U+FFFD from its start, once it breaks
    assert stream(ids, tokenizer=tokenizer, prompt=prompt)[0].text == whole[len(before) :]


def test_a_sentencepiece_continuation_keeps_its_first_space_and_completes_the_prompts_last_character() -> None:
    the, a, cat = (BYTE_FALLBACK.backend_tokenizer.token_to_id(token) for token in ("▁the", "▁a", "猫"))
    assert stream([a, cat], tokenizer=BYTE_FALLBACK, prompt=[the])[1] == [" a", "猫", ""]
    assert stream([a, cat], (" a",), tokenizer=BYTE_FALLBACK, prompt=[the])[0].text == ""
    first, *rest = [BYTE_FALLBACK.backend_tokenizer.token_to_id(f"<0x{byte:02X}>") for byte in "é".encode()]
    assert stream([*rest, cat], tokenizer=BYTE_FALLBACK, prompt=[the, first])[0].text == "é猫"


@given(texts, st.lists(st.text(alphabet="ab .é€猫🙂", min_size=1, max_size=4), min_size=1, max_size=3), seeds)
def test_text_ends_before_the_first_of_many_stop_strings(text: str, stops: list[str], seed: int) -> None:
    result, pieces = stream(TOKENIZER.split(text, seed), tuple(stops))
    assert result.text == "".join(pieces)
    found = [stop for stop in stops if stop in text]
    assert result.stopped == bool(found)
    if not found:
        assert result.text == text
    else:  # the stop string that is complete first counts
        assert text.startswith(result.text)
        assert any(text.startswith(stop, len(result.text)) for stop in stops)
        assert len(result.text) < min(text.find(stop) + len(stop) for stop in found)
        assert not any(stop in result.text for stop in stops)


@given(texts.filter(bool), seeds, st.data())
def test_one_stop_string_anywhere_is_cut_exactly(text: str, seed: int, data: st.DataObject) -> None:
    start = data.draw(st.integers(0, len(text) - 1))
    stop = text[start : data.draw(st.integers(start + 1, len(text)))]
    result, pieces = stream(TOKENIZER.split(text, seed), (stop,))
    assert result.stopped
    assert result.text == "".join(pieces) == text[: text.find(stop)]


@given(texts, st.lists(st.text(alphabet="ab .é€猫🙂", min_size=1, max_size=6), max_size=3), seeds)
def test_streamed_text_is_a_prefix_of_the_final_text(text: str, stops: list[str], seed: int) -> None:
    result, pieces = stream(TOKENIZER.split(text, seed), tuple(stops))
    taken = ""
    for piece in pieces:
        taken += piece
        assert result.text.startswith(taken)


def test_beginning_of_a_stop_string_is_held_back_until_it_is_refuted() -> None:
    text = TextStream(TOKENIZER, ("END",))
    taken = []
    for letter in "aENbEN":
        text.push(TOKENIZER.split(letter, 0)[0])
        taken.append(text.take())
    assert taken == ["a", "", "", "ENb", "", ""]
    text.finish()
    assert text.take(last=True) == "EN"


def test_special_tokens_have_no_text() -> None:
    begin, end = (TOKENIZER.backend_tokenizer.token_to_id(token) for token in ("<s>", "</s>"))
    result, _ = stream([begin, *TOKENIZER.split("fox", 0), end])
    assert result.text == "fox"


def test_without_a_tokenizer_there_is_no_text_and_nothing_stops_it() -> None:
    text = TextStream(None, ("a",))
    assert not any(text.push(token) for token in range(9))
    text.finish()
    assert text.take(last=True) == text.text == ""


words_and_characters = st.lists(
    st.one_of(
        st.sampled_from(["▁", "▁the", "▁a", "b", "猫", "."]).map(lambda token: [token]),
        st.sampled_from("a\né€🙂").map(lambda char: [f"<0x{byte:02X}>" for byte in char.encode()]),
    ),
    max_size=12,
).map(lambda parts: [token for part in parts for token in part])


@given(words_and_characters)
def test_byte_fallback_tokens_stream_to_the_same_text(tokens: list[str]) -> None:
    ids = [BYTE_FALLBACK.backend_tokenizer.token_to_id(token) for token in tokens]
    result, pieces = stream(ids, tokenizer=BYTE_FALLBACK)
    assert result.text == "".join(pieces) == BYTE_FALLBACK.decode(ids)


def test_byte_fallback_run_that_turns_invalid_takes_nothing_back_and_loses_no_word() -> None:
    ids = [BYTE_FALLBACK.backend_tokenizer.token_to_id(t) for t in ("▁a", "<0x61>", "<0xC3>", "▁the", "▁a", "b")]
    assert BYTE_FALLBACK.decode(ids) == "a\ufffd\ufffd the ab"
    result, pieces = stream(ids, tokenizer=BYTE_FALLBACK)
    assert result.text == "".join(pieces) == "aa\ufffd the ab"


@given(st.lists(st.integers(0, BYTE_FALLBACK.backend_tokenizer.get_vocab_size() - 1), max_size=20))
def test_any_byte_fallback_tokens_stream_without_an_error(ids: list[int]) -> None:
    result, pieces = stream(ids, tokenizer=BYTE_FALLBACK)
    assert result.text == "".join(pieces)


@pytest.mark.parametrize("stop", ["€", "猫"])
def test_stop_string_whose_last_byte_ends_the_output_is_found(stop: str) -> None:
    ids = [TOKENIZER.backend_tokenizer.token_to_id(BYTE_CHARS[b]) for b in ("ab" + stop).encode()]
    result, _ = stream(ids, (stop,))
    assert result.stopped and result.text == "ab"
