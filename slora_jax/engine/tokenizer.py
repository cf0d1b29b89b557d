"""The tokenizer of a model directory, read without transformers (whose import takes many seconds)."""

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
"""One template, or several by name: "default", "tool_use"."""


class Tokenizer:
    """Text to token ids and back, with the interface of a fast Hugging Face tokenizer as far as the engine uses it.

    The backend (`tokenizer.json`) alone decides how text is cut and joined, whatever `tokenizer_class` says; its
    post-processor decides which special tokens surround a text, so `add_bos_token` and `add_eos_token` of
    `tokenizer_config.json` have no effect. transformers 5 does the same for `PreTrainedTokenizerFast`.

    Attributes:
      backend_tokenizer: the tokenizer of the `tokenizers` library.
      chat_template: one Jinja template, several by name, or None.
      special_tokens_map: texts of the special tokens by their names ("bos_token"), as chat templates see them.
    """

    def __init__(
        self,
        backend: Backend,
        *,
        chat_template: ChatTemplate | None = None,
        special_tokens: Mapping[str, str] | None = None,
        clean_up_spaces: bool = False,
    ) -> None:
        """Takes over `backend`: switches off its truncation and padding, and makes special tokens of its vocabulary's
        `special_tokens`, so that they are recognized in text. clean_up_spaces: whether `decode` removes spaces before
        punctuation."""
        backend.no_truncation()
        backend.no_padding()
        self.backend_tokenizer = backend
        self.chat_template = chat_template
        self.special_tokens_map = dict(special_tokens or {})
        self._clean_up_spaces = clean_up_spaces
        _add_special(backend, self.special_tokens_map.values())

    @classmethod
    def from_directory(cls, path: str | Path) -> Tokenizer:
        """Reads `tokenizer.json`; special tokens and chat templates from the files beside it, where present.

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
        else:  # written before transformers 4.34
            config |= _read_object(path / "special_tokens_map.json")
        extra = config.get("extra_special_tokens", config.get("additional_special_tokens")) or ()
        if isinstance(extra, Mapping):
            config |= extra
        else:
            _add_special(backend, filter(None, map(_text, extra)))
        backend.encode_special_tokens = bool(config.get("split_special_tokens", False))
        # transformers cleans up for WordPiece, and for BPE only if two fields ask for it
        asks_for_it = bool(config.get("clean_up_tokenization_spaces", False))
        insists = bool(config.get("clean_up_tokenization_spaces_for_bpe_even_though_it_will_corrupt_output", False))
        return cls(
            backend,
            chat_template=_chat_template(path, config),
            special_tokens=_special_tokens(config),
            clean_up_spaces=asks_for_it and (insists or type(backend.model).__name__ != "BPE"),
        )

    def __call__(self, text: str, *, add_special_tokens: bool = True) -> dict[str, list[int]]:
        """The text's tokens, under "input_ids". add_special_tokens: whether the post-processor's are added."""
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
        """The conversation as text; see `chat_template.render`. Its special tokens are written out: tokenize it with
        `add_special_tokens=False`.

        Args:
          chat_template: the name of one of the model's templates, or a template; None: the model's "tool_use" if there
            are tools, else its "default".

        Raises:
          ValueError: there is no template, or no message; or tokenize is True.
          jinja2.TemplateError: the template refuses the conversation.
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
    """The JSON object in a file; an empty one if there is no such file."""
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
    """The texts of the fields that name a token (`bos_token`, `image_token`)."""
    texts = {name: _text(value) for name, value in config.items() if name.endswith("_token")}
    return {name: text for name, text in texts.items() if text is not None}


def _text(token: Any) -> str | None:
    """The text of a token, which is written as such or as a dictionary with its "content"; None for what is neither."""
    text = token.get("content") if isinstance(token, Mapping) else token
    return text if isinstance(text, str) else None


def _chat_template(path: Path, config: Mapping[str, Any]) -> ChatTemplate | None:
    """The templates in files of their own, else those of `tokenizer_config.json`."""
    files = {"default": path / "chat_template.jinja"}
    files |= {file.stem: file for file in sorted((path / "additional_chat_templates").glob("*.jinja"))}
    found: Any = {name: file.read_text(encoding="utf-8") for name, file in files.items() if file.is_file()}
    if not found:
        found = config.get("chat_template")
    if isinstance(found, list):
        found = {one["name"]: one["template"] for one in found}
    return found["default"] if isinstance(found, dict) and found.keys() == {"default"} else found


def _add_declared(backend: Backend, declared: Mapping[str, Any]) -> None:
    """Makes added tokens of the vocabulary's entries that `added_tokens_decoder` declares under their ids."""
    for index, token in declared.items():
        text = _text(token)
        if text is not None and backend.token_to_id(text) == int(index) and _is_ordinary(backend, text):
            flags = {name: token[name] for name in ("single_word", "lstrip", "rstrip", "normalized") if name in token}
            add = backend.add_special_tokens if token.get("special") else backend.add_tokens
            add([AddedToken(text, special=bool(token.get("special")), **flags)])


def _add_special(backend: Backend, tokens: Iterable[str]) -> None:
    """Makes special tokens of the vocabulary's entries `tokens`."""
    for token in tokens:
        if _is_ordinary(backend, token):
            backend.add_special_tokens([AddedToken(token, special=True, normalized=False)])


def _is_ordinary(backend: Backend, token: str) -> bool:
    """Returns whether this token of the vocabulary is built from pieces of text."""
    index = backend.token_to_id(token)
    return index is not None and index not in backend.get_added_tokens_decoder()


def _without_spaces(text: str) -> str:
    for mark in (".", "?", "!", ","):
        text = text.replace(f" {mark}", mark)
    text = text.replace(" ' ", "'")
    for ending in ("n't", "'m", "'s", "'ve", "'re"):
        text = text.replace(f" {ending}", ending)
    return text
