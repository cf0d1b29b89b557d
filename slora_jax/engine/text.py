"""Incremental detokenization, and detection of stop strings that span several tokens."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tokenizers.decoders import DecodeStream

from slora_jax.engine.tokenizer import Tokenizer
from slora_jax.errors import CheckpointError
from slora_jax.models.gguf.header import gguf_file
from slora_jax.models.gguf.tokenizer import read_gguf_tokenizer

LEGACY_FILES = ("tokenizer.model", "vocab.json")
"""Files from which transformers makes a fast tokenizer if there is no `tokenizer.json`."""

logger = logging.getLogger(__name__)


def load_tokenizer(model_dir: Path) -> Any:
    """Loads the tokenizer of a Hugging Face directory or GGUF file. Returns None if there is none.

    Raises:
      CheckpointError: its files are damaged or have no fast version.
    """
    if file := gguf_file(model_dir):
        parts = read_gguf_tokenizer(file)
        if parts is None:
            return None
        return Tokenizer(parts.backend, chat_template=parts.chat_template, special_tokens=parts.special_tokens)
    if (model_dir / "tokenizer.json").exists():
        return Tokenizer.from_directory(model_dir)
    if not any((model_dir / name).exists() for name in LEGACY_FILES):
        return None
    logger.warning("%s: has no tokenizer.json; transformers converts older files, which takes a while", model_dir)
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(model_dir)
    except (ImportError, OSError, ValueError) as error:
        raise CheckpointError(f"{model_dir}: transformers cannot load the tokenizer: {error}") from error
    if not hasattr(tokenizer, "backend_tokenizer"):
        raise CheckpointError(f"{model_dir}: the tokenizer has no fast version; add its tokenizer.json")
    return tokenizer


CONTEXT_TOKENS = 64
"""Number of last prompt tokens used as context to decode the first output tokens."""


class TextStream:
    """The generated text of one request.

    It is decoded after the end of the prompt, because a SentencePiece tokenizer omits the leading space of a first
    token. Text that may be the beginning of a stop string is held back.

    Attributes:
      stopped: whether the text contained a stop string.
    """

    def __init__(
        self, tokenizer: Any, stop: tuple[str, ...], prompt: Sequence[int] = (), *, skip_special: bool = True
    ) -> None:
        """Starts an empty text.

        Args:
          tokenizer: a `Tokenizer` or a fast Hugging Face one; None produces no text and ignores stop strings.
          stop: stop strings.
          prompt: token ids of the prompt.
          skip_special: whether the text leaves out special tokens.
        """
        self._skip_special = skip_special
        self._backend = None if tokenizer is None else tokenizer.backend_tokenizer
        self._stop = stop
        self._longest_stop = max(map(len, stop), default=0)
        self._ids: list[int] = []  # last prompt tokens, then output tokens
        self._context = ""  # text of the last prompt tokens
        self._text = ""
        self._emitted = 0
        self.stopped = False
        if self._backend is not None:
            self._decoder = self._begin(list(prompt[-CONTEXT_TOKENS:]))

    @property
    def text(self) -> str:
        """All text so far, cut before a stop string."""
        return self._text

    def push(self, token: int) -> bool:
        """Adds a token. Returns whether it completes a stop string; the text then ends before that string."""
        if self._backend is None:
            return False
        self._ids.append(token)
        piece = self._decode(token)
        if not piece:
            return False
        if self._stop:
            return self._append(piece)
        self._text += piece
        return False

    def finish(self) -> None:
        """Flushes the bytes of an incomplete last character; they may still complete a stop string."""
        if self._backend is None or self.stopped:
            return
        known, whole = (
            self._context + self._text,
            self._backend.decode(self._ids, skip_special_tokens=self._skip_special),
        )
        if whole.startswith(known) and len(whole) > len(known):
            self._append(whole[len(known) :])

    def take(self, last: bool = False) -> str:
        """Returns new text that no later token can change. With `last`, no token follows, so all text is returned."""
        text, start = self._text, self._emitted
        end = self._certain() if self._stop and not last and not self.stopped else len(text)
        if end > start:
            self._emitted = end
        return text[start:end]

    def _begin(self, context: list[int]) -> DecodeStream:
        """Returns a decoder that has read `context`, where later tokens may complete an incomplete last character."""
        decode = self._backend.decode  # type: ignore[union-attr]
        end = len(context)
        while end and decode(context[:end], skip_special_tokens=self._skip_special).endswith("\ufffd"):
            end -= 1
        self._ids, self._context = context[:end], decode(context[:end], skip_special_tokens=self._skip_special)
        self._decoder = DecodeStream(ids=context[:end], skip_special_tokens=self._skip_special)
        for token in context[end:]:
            self._ids.append(token)
            self._context += self._decode(token) or ""
        return self._decoder

    def _decode(self, token: int) -> str | None:
        """Returns the text that this token completes, or None while a character is incomplete."""
        try:
            return self._decoder.step(self._backend, token)
        except Exception:  # noqa: BLE001  tokenizers has no finer class
            # A byte-fallback decoder replaces a whole run of byte tokens by U+FFFD if the run's end makes it invalid,
            # including text already emitted. Keep that text, and emit one U+FFFD for the rest.
            self._decoder = DecodeStream(ids=self._ids, skip_special_tokens=self._skip_special)
            decode = self._backend.decode  # type: ignore[union-attr]
            before, after = (decode(ids, skip_special_tokens=self._skip_special) for ids in (self._ids[:-1], self._ids))
            return "\ufffd" + after.removeprefix(before)

    def _append(self, piece: str) -> bool:
        search_from = max(0, len(self._text) - self._longest_stop + 1)
        self._text += piece
        found = [at for s in self._stop if (at := self._text.find(s, search_from)) >= 0]
        if found:
            self._text = self._text[: min(found)]
            self.stopped = True
        return self.stopped

    def _certain(self) -> int:
        """Length of the text before the longest suffix that is the beginning of a stop string."""
        text = self._text
        for start in range(max(self._emitted, len(text) - self._longest_stop + 1), len(text)):
            if any(s.startswith(text[start:]) for s in self._stop):
                return start
        return len(text)
