"""The tokenizer of a model directory, loaded without transformers, whose import takes many seconds."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from tokenizers import AddedToken
from tokenizers import Tokenizer as Backend

from slora_jax.engine import chat_template as templates
from slora_jax.errors import CheckpointError

ChatTemplate = str | Mapping[str, str]
"""One template, or several by name, such as "default" and "tool_use"."""


class Tokenizer:
    """A tokenizer with the part of the interface of fast Hugging Face tokenizers that the engine uses.

    `tokenizer.json` alone defines the tokenization; `tokenizer_class` is ignored. Its post-processor defines the
    special tokens around a text, so `add_bos_token` and `add_eos_token` of `tokenizer_config.json` have no effect.
    transformers 5 does the same for `PreTrainedTokenizerFast`.

    Attributes:
      backend_tokenizer: the tokenizer of the `tokenizers` library.
      chat_template: one Jinja template, several by name, or None.
      response_template: how the model writes tool calls, as transformers' `ResponseParser` reads it, or None.
      special_tokens_map: text of each special token by name ("bos_token"), for chat templates.
    """

    def __init__(
        self,
        backend: Backend,
        *,
        chat_template: ChatTemplate | None = None,
        special_tokens: Mapping[str, str] | None = None,
        clean_up_spaces: bool = False,
        response_template: Mapping[str, Any] | None = None,
    ) -> None:
        """Configures `backend`: disables truncation and padding, and registers its special tokens.

        Args:
          special_tokens: text by name; those in the vocabulary are recognized in text.
          clean_up_spaces: whether `decode` removes spaces before punctuation.
        """
        backend.no_truncation()
        backend.no_padding()
        self.backend_tokenizer = backend
        self.chat_template = chat_template
        self.response_template = response_template
        self.special_tokens_map = dict(special_tokens or {})
        self._clean_up_spaces = clean_up_spaces
        _add_special(backend, self.special_tokens_map.values())

    @classmethod
    def from_directory(cls, path: str | Path) -> Tokenizer:
        """Loads `tokenizer.json`, and special tokens and chat templates from other files of the directory if present.

        Raises:
          CheckpointError: a file is missing or damaged.
        """
        path = Path(path)
        file = path / "tokenizer.json"
        try:
            backend = Backend.from_file(str(file))
        except Exception as error:  # tokenizers has no finer class
            raise CheckpointError(f"{file}: cannot be read as a tokenizer: {error}") from error
        config = _read_object(path / "tokenizer_config.json")
        declared = config.get("added_tokens_decoder")
        if isinstance(declared, Mapping):
            _add_declared(backend, declared)
        else:  # files from before transformers 4.34
            config |= _read_object(path / "special_tokens_map.json")
        extra = config.get("extra_special_tokens", config.get("additional_special_tokens")) or ()
        if isinstance(extra, Mapping):
            config |= extra
        else:
            _add_special(backend, filter(None, map(_text, extra)))
        backend.encode_special_tokens = bool(config.get("split_special_tokens", False))
        # as in transformers, BPE needs both fields
        clean_up = bool(config.get("clean_up_tokenization_spaces", False))
        even_bpe = bool(config.get("clean_up_tokenization_spaces_for_bpe_even_though_it_will_corrupt_output", False))
        return cls(
            backend,
            chat_template=_chat_template(path, config),
            special_tokens=_special_tokens(config),
            response_template=config.get("response_template"),
            clean_up_spaces=clean_up and (even_bpe or type(backend.model).__name__ != "BPE"),
        )

    def __call__(self, text: str, *, add_special_tokens: bool = True) -> dict[str, list[int]]:
        """Returns the token ids as "input_ids", by default with the post-processor's special tokens."""
        return {"input_ids": self.backend_tokenizer.encode(text, add_special_tokens=add_special_tokens).ids}

    def decode(self, ids: Sequence[int], *, skip_special_tokens: bool = False) -> str:
        text = self.backend_tokenizer.decode([int(token) for token in ids], skip_special_tokens=skip_special_tokens)
        return _without_spaces(text) if self._clean_up_spaces else text

    def apply_chat_template(
        self,
        conversation: Sequence[templates.Message],
        tools: Sequence[Mapping[str, Any]] | None = None,
        documents: Sequence[Mapping[str, Any]] | None = None,
        chat_template: str | None = None,
        add_generation_prompt: bool = False,
        tokenize: bool = False,
        **variables: Any,
    ) -> str:
        """Renders the conversation as text (`chat_template.render`).

        The text includes special tokens, so tokenize it with `add_special_tokens=False`.

        Args:
          chat_template: name of one of the model's templates, or a template. None selects the model's "tool_use" if
            there are tools, else its "default".

        Raises:
          ValueError: there is no template or no message, or `tokenize` is True.
          jinja2.TemplateError: the template rejects the conversation.
        """
        if tokenize:
            raise ValueError("apply_chat_template: tokenize=True is not supported; tokenize the text")
        if not conversation:
            raise ValueError("apply_chat_template: the conversation is empty; it must have at least one message")
        return templates.render(
            self._template(chat_template, tools is not None),
            conversation,
            tools=tools,
            documents=documents,
            add_generation_prompt=add_generation_prompt,
            **{**self.special_tokens_map, **variables},
        )

    @property
    def bos_token(self) -> str | None:
        return self.special_tokens_map.get("bos_token")

    @property
    def eos_token(self) -> str | None:
        return self.special_tokens_map.get("eos_token")

    @property
    def pad_token(self) -> str | None:
        return self.special_tokens_map.get("pad_token")

    @property
    def unk_token(self) -> str | None:
        return self.special_tokens_map.get("unk_token")

    @property
    def bos_token_id(self) -> int | None:
        return self._id(self.bos_token)

    @property
    def eos_token_id(self) -> int | None:
        return self._id(self.eos_token)

    @property
    def pad_token_id(self) -> int | None:
        return self._id(self.pad_token)

    @property
    def unk_token_id(self) -> int | None:
        return self._id(self.unk_token)

    def _id(self, token: str | None) -> int | None:
        return None if token is None else self.backend_tokenizer.token_to_id(token)

    def _template(self, given: str | None, with_tools: bool) -> str:
        if self.chat_template is None or isinstance(self.chat_template, str):
            template = given or self.chat_template
            if template is None:
                raise ValueError("the model has no chat template")
            return template
        if given is not None:
            return self.chat_template.get(given, given)
        name = "tool_use" if with_tools and "tool_use" in self.chat_template else "default"
        if name not in self.chat_template:
            raise ValueError(
                f"the model has several chat templates and no default; name one of {[*self.chat_template]}"
            )
        return self.chat_template[name]


def _read_object(path: Path) -> dict[str, Any]:
    """Returns the JSON object in a file, or an empty one if the file does not exist."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path}: cannot be read as JSON: {error}") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{path}: expected a JSON object, found {type(content).__name__}")
    return content


def _special_tokens(config: Mapping[str, Any]) -> dict[str, str]:
    """Returns the text of each field that names a token, such as `bos_token` or `image_token`."""
    texts = {name: _text(value) for name, value in config.items() if name.endswith("_token")}
    return {name: text for name, text in texts.items() if text is not None}


def _text(token: Any) -> str | None:
    """Returns the text of a token given as a string or as a dictionary with "content"; None for other values."""
    text = token.get("content") if isinstance(token, Mapping) else token
    return text if isinstance(text, str) else None


def _chat_template(path: Path, config: Mapping[str, Any]) -> ChatTemplate | None:
    """Returns the templates in separate files, else those of `tokenizer_config.json`."""
    files = {"default": path / "chat_template.jinja"}
    files |= {file.stem: file for file in sorted((path / "additional_chat_templates").glob("*.jinja"))}
    found: Any = {name: file.read_text(encoding="utf-8") for name, file in files.items() if file.is_file()}
    if not found:
        found = config.get("chat_template")
    if isinstance(found, list):
        found = {one["name"]: one["template"] for one in found}
    return found["default"] if isinstance(found, dict) and found.keys() == {"default"} else found


def _add_declared(backend: Backend, declared: Mapping[str, Any]) -> None:
    """Registers the vocabulary entries that `added_tokens_decoder` declares as added tokens."""
    for index, token in declared.items():
        text = _text(token)
        if text is not None and backend.token_to_id(text) == int(index) and _is_ordinary(backend, text):
            flags = {name: token[name] for name in ("single_word", "lstrip", "rstrip", "normalized") if name in token}
            add = backend.add_special_tokens if token.get("special") else backend.add_tokens
            add([AddedToken(text, special=bool(token.get("special")), **flags)])


def _add_special(backend: Backend, tokens: Iterable[str]) -> None:
    """Registers vocabulary entries as special tokens."""
    for token in tokens:
        if _is_ordinary(backend, token):
            backend.add_special_tokens([AddedToken(token, special=True, normalized=False)])


def _is_ordinary(backend: Backend, token: str) -> bool:
    """Returns whether a token is in the vocabulary but not an added token."""
    index = backend.token_to_id(token)
    return index is not None and index not in backend.get_added_tokens_decoder()


def _without_spaces(text: str) -> str:
    for mark in (".", "?", "!", ","):
        text = text.replace(f" {mark}", mark)
    text = text.replace(" ' ", "'")
    for ending in ("n't", "'m", "'s", "'ve", "'re"):
        text = text.replace(f" {ending}", ending)
    return text
