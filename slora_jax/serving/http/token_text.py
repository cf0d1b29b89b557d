"""Bytes and names of single tokens, for log-probabilities."""

from __future__ import annotations

import json
import re
from functools import cached_property
from typing import Any

BYTE = re.compile(r"<0x([0-9A-F]{2})>")


class TokenText:
    """Bytes and names of a tokenizer's tokens. Without a tokenizer, names are numbers."""

    def __init__(self, tokenizer: Any) -> None:
        self._backend = None if tokenizer is None else tokenizer.backend_tokenizer
        self._bytes: dict[int, bytes] = {}  # at most the vocabulary

    def name(self, token: int) -> str:
        r"""Returns a token's text; for part of a character, its bytes as OpenAI writes them: `bytes:\xf0\x9f`."""
        if self._backend is None:
            return _by_number(token)
        raw = self.raw(token)
        try:
            return raw.decode()
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in raw)

    def values(self, pairs: tuple[tuple[int, float], ...]) -> dict[str, float]:
        """Returns values by token name, best last. If tokens share a text, only the best has it as its name."""
        names: dict[str, int] = {}
        for token, _ in pairs:
            name = self.name(token)
            names[_by_number(token) if name in names else name] = token
        values = dict(pairs)
        return {name: values[token] for name, token in reversed(names.items())}

    def raw(self, token: int) -> bytes:
        """Returns a token's bytes in a text, as UTF-8."""
        raw = self._bytes.get(token)
        if raw is None:
            raw = self._bytes[token] = self._raw(token)
        return raw

    def is_special(self, token: int) -> bool:
        """Returns True for a special token, which is not part of an answer's text."""
        return token in self._special

    def _raw(self, token: int) -> bytes:
        if self._backend is None:
            return _by_number(token).encode()
        if token in self._added:
            return self._added[token].content.encode()
        piece = self._backend.id_to_token(token)
        if piece is None:  # the model has more rows than the tokenizer has tokens
            return b""
        if "ByteLevel" in self._decoders and all(char in BYTE_OF for char in piece):
            return bytes(BYTE_OF[char] for char in piece)
        if "ByteFallback" in self._decoders and (byte := BYTE.fullmatch(piece)):
            return bytes([int(byte[1], 16)])
        # A decoder may treat the first token differently, so the token's text is what a second one adds.
        once, twice = (self._backend.decode([token] * count, skip_special_tokens=False) for count in (1, 2))
        return twice.removeprefix(once).encode(errors="replace")

    @cached_property
    def _added(self) -> dict[int, Any]:
        return self._backend.get_added_tokens_decoder()  # type: ignore[union-attr]

    @cached_property
    def _special(self) -> frozenset[int]:
        return frozenset() if self._backend is None else frozenset(t for t, one in self._added.items() if one.special)

    @cached_property
    def _decoders(self) -> set[str]:
        """Types of the decoders in the tokenizer's decoder."""
        decoder = self._backend.decoder  # type: ignore[union-attr]
        state = {} if decoder is None else json.loads(decoder.__getstate__())
        return {part["type"] for part in state.get("decoders", [state]) if "type" in part}


def _by_number(token: int) -> str:
    return f"token_id:{token}"


def _bytes_of_characters() -> dict[str, int]:
    """Returns GPT-2's mapping: a printable byte is its own character; the others follow from U+0100 on."""
    printable = [*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + i): byte for i, byte in enumerate(others)}


BYTE_OF = _bytes_of_characters()
"""Character of a byte-level token -> byte."""
