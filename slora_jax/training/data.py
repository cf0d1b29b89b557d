"""Training examples from JSONL files: token ids, with a mask of the tokens to train.

A line is `{"messages": [{"role": ..., "content": ...}, ...]}`, whose assistant turns are trained, or
`{"prompt": ..., "completion": ...}`, whose completion is trained.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from slora_jax.engine.arrival import text_ids
from slora_jax.errors import ConfigError, RequestError
from slora_jax.training.batch import Example
from slora_jax.training.recipe import AdapterRecipe, Recipe
from slora_jax.typed import refuse_unknown

DEFAULT_MAX_LENGTH = 1024
"""Tokens of the longest example if the recipe does not say."""

_SHOWN = 5
"""Most bad lines of a file that an error shows."""

_ORDER, _SPLIT = 0, 1
"""First parts of the seeds of the examples' order and of the held-out share."""


@dataclass(frozen=True, eq=False)
class Sample:
    """One example.

    Attributes:
      ids: int32 `[n]` token ids.
      trained: bool `[n]`, whether the model is trained to predict the token. The first one never is.
    """

    ids: np.ndarray
    trained: np.ndarray

    @property
    def num_trained(self) -> int:
        """Number of tokens trained."""
        return int(self.trained.sum())


@dataclass(frozen=True, eq=False)
class Dataset:
    """The examples of one adapter.

    Attributes:
      train: examples to train on, at least one.
      evaluation: examples to evaluate on; may be empty.
      warnings: counts of examples skipped or cut.
    """

    train: Sequence[Sample]
    evaluation: Sequence[Sample]
    warnings: tuple[str, ...] = ()

    def steps(self, adapter: AdapterRecipe) -> int:
        """Optimizer steps of the whole training."""
        if adapter.steps is not None:
            return adapter.steps
        assert adapter.epochs is not None
        return adapter.epochs * -(-len(self.train) // adapter.batch_size)

    def batch(self, adapter: AdapterRecipe, step: int) -> list[Sample]:
        """Returns the examples of optimizer step `step`, counted from 0: a function of the seed and the step alone.

        Each epoch has an order of its own. Its last batch may be smaller than `batch_size`.
        """
        per_epoch = -(-len(self.train) // adapter.batch_size)
        epoch, number = divmod(step, per_epoch)
        order = np.random.default_rng([_ORDER, adapter.seed, epoch]).permutation(len(self.train))
        start = number * adapter.batch_size
        return [self.train[index] for index in order[start : start + adapter.batch_size]]

    def digest(self) -> str:
        """Digest of all examples, for comparison with a checkpoint's."""
        digest = hashlib.sha256()
        for part in (self.train, self.evaluation):
            digest.update(b"part")
            for one in part:
                digest.update(len(one.ids).to_bytes(8, "little") + one.ids.tobytes() + one.trained.tobytes())
        return digest.hexdigest()


@dataclass
class Encoder:
    """Turns the lines of JSONL files into examples.

    Attributes:
      tokenizer: the model's.
      end: id of the end-of-sequence token, which ends a completion; None if the model has none.
      max_length: tokens of the longest example.
      cut: whether a longer example is cut; otherwise it is skipped.
    """

    tokenizer: Any
    end: int | None
    max_length: int
    cut: bool = False
    _files: dict[Path, tuple[list[Sample], tuple[str, ...]]] = field(default_factory=dict)

    def read(self, path: Path) -> tuple[list[Sample], tuple[str, ...]]:
        """Reads a JSONL file; empty lines are ignored.

        Returns:
          The examples with a token to train, and warnings that count the others.

        Raises:
          ConfigError: the file cannot be read, or lines are bad. The message names file, lines and fields.
        """
        if path not in self._files:
            self._files[path] = self._read(path)
        return self._files[path]

    def _read(self, path: Path) -> tuple[list[Sample], tuple[str, ...]]:
        try:
            lines = path.read_bytes().splitlines()
        except OSError as error:
            raise ConfigError(f"{path}: cannot be read: {error.strerror or error}; give a JSONL file") from None
        examples, problems, too_long, untrained = [], [], 0, 0
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            try:
                example = self._example(line)
            except (ConfigError, RequestError) as error:
                problems.append(f"line {number}: {error}")
                continue
            if len(example.ids) > self.max_length:
                too_long += 1
                if not self.cut:
                    continue
                example = Sample(example.ids[: self.max_length], example.trained[: self.max_length])
            if example.num_trained:
                examples.append(example)
            else:
                untrained += 1
        if problems:
            shown = "; ".join(problems[:_SHOWN]) + ("; ..." if len(problems) > _SHOWN else "")
            raise ConfigError(f"{path}: {len(problems)} of {len(lines)} lines are bad: {shown}")
        warnings = []
        if too_long:
            action = "cut to" if self.cut else "skipped: they exceed"
            warnings.append(f"{path}: {too_long} of {len(lines)} examples are {action} max_length={self.max_length}")
        if untrained:
            reason = f"with max_length={self.max_length} they have no token to train"
            warnings.append(f"{path}: {untrained} of {len(lines)} examples are skipped: {reason}")
        return examples, tuple(warnings)

    def _example(self, line: bytes) -> Sample:
        """Reads one line. Raises ConfigError or RequestError naming the field."""
        try:
            data = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise ConfigError(f"not valid JSON: {error}") from None
        if not isinstance(data, Mapping):
            raise ConfigError("must be a JSON object with messages, or with prompt and completion")
        if "messages" in data:
            refuse_unknown(data, ("messages",), "")
            return self.conversation(_messages(data["messages"]))
        refuse_unknown(data, ("messages", "prompt", "completion"), "")
        for name in ("prompt", "completion"):
            if not isinstance(data.get(name), str):
                found = f"={data[name]!r:.80}: must be text" if name in data else " is missing: give text, or messages"
                raise ConfigError(f"{name}{found}")
        return self.completion(data["prompt"], data["completion"])

    def completion(self, prompt: str, completion: str) -> Sample:
        """Returns an example that trains a completion and the end-of-sequence token after it.

        Raises:
          ConfigError: the completion is empty, the model has no such token, or the two texts cannot be joined.
        """
        if not completion:
            raise ConfigError("completion='': must not be empty")
        if self.end is None:
            raise ConfigError("completion: the model names no end-of-sequence token to end it; give messages")
        ids, starts = self._joined([prompt, completion], special=True)
        trained = np.arange(len(ids) + 1) >= max(starts[1], 1)
        return Sample(np.array([*ids, self.end], np.int32), trained)

    def conversation(self, messages: Sequence[Mapping[str, str]]) -> Sample:
        """Returns an example that trains the assistant's turns in the model's chat template, each with its end.

        A turn begins where the template's generation prompt ends.

        Raises:
          ConfigError: the template rejects the messages, or renders a beginning of the conversation otherwise than in
            the whole.
        """
        whole = self._render(messages, False)
        pieces, position = [], 0  # texts in turn: not trained, trained
        for index, message in enumerate(messages):
            if message["role"] != "assistant":
                continue
            before = self._render(messages[:index], True)
            after = self._render(messages[: index + 1], False)
            if not after.startswith(before):
                raise ConfigError(
                    f"messages[{index}]: the model's chat template renders the prompt of this turn differently when "
                    "the turn follows, so that the tokens to train are unknown; give prompt and completion"
                )
            if not whole.startswith(after):
                raise ConfigError(
                    f"messages[{index}]: the model's chat template renders this turn differently when others follow, "
                    "so that the tokens to train are unknown; end the conversation with this turn"
                )
            pieces += [whole[position : len(before)], whole[len(before) : len(after)]]
            position = len(after)
        ids, starts = self._joined([*pieces, whole[position:]], special=False)
        trained = np.zeros(len(ids), bool)
        for start, end in zip(starts[1::2], starts[2::2], strict=True):
            trained[max(start, 1) : self._end_of_turn(ids, start, end)] = True
        used = 1 + int(trained.nonzero()[0].max(initial=0))  # later tokens would be computed in vain
        return Sample(np.array(ids[:used], np.int32), trained[:used])

    def _render(self, messages: Sequence[Mapping[str, str]], prompt: bool) -> str:
        try:
            text: str = self.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=prompt)
        except Exception as error:  # a template may raise any type
            raise ConfigError(f"messages: the model's chat template rejects them: {error}") from error
        return text

    def _joined(self, pieces: Sequence[str], special: bool) -> tuple[list[int], list[int]]:
        """Tokenizes consecutive pieces of a text so that each begins with a token of its own.

        The ids are those of the whole text if a token begins at each piece. Otherwise the pieces are tokenized one by
        one: a served prompt that ends there has these tokens.

        Args:
          special: whether the tokenizer adds its special tokens, such as a begin-of-sequence token.

        Returns:
          The ids, and the index of each piece's first token.

        Raises:
          ConfigError: the tokenizer changes a text that is tokenized in pieces.
        """
        whole = self._ids("".join(pieces), special)
        starts, text = [0], ""
        for piece in pieces[:-1]:
            text += piece
            beginning = self._ids(text, special)
            if whole[: len(beginning)] != beginning:
                break
            starts.append(len(beginning))
        else:
            return whole, starts
        parts = [self._ids(piece, special and number == 0) for number, piece in enumerate(pieces)]
        joined = [token for part in parts for token in part]
        decode = self.tokenizer.backend_tokenizer.decode
        if decode(joined, skip_special_tokens=False) != decode(whole, skip_special_tokens=False):
            raise ConfigError(
                f"the tokenizer joins the end of the prompt ({text[-20:]!r}) with the text to train; "
                "move the space between them to the text to train"
            )
        return joined, [sum(map(len, parts[:number])) for number in range(len(parts))]

    def _ids(self, text: str, special: bool) -> list[int]:
        return text_ids(text, self.tokenizer, len(text) + 1, add_special_tokens=special)

    def _end_of_turn(self, ids: Sequence[int], start: int, end: int) -> int:
        """Returns the index after the last trained token of a turn: white space after a special token is left out."""
        for last in range(end, start, -1):
            if ids[last - 1] in self._special:
                rest = self.tokenizer.backend_tokenizer.decode(list(ids[last:end]), skip_special_tokens=False)
                return end if rest.strip() else last
        return end

    @cached_property
    def _special(self) -> frozenset[int]:
        added = self.tokenizer.backend_tokenizer.get_added_tokens_decoder()
        return frozenset(index for index, token in added.items() if token.special)


def _messages(value: Any) -> list[Mapping[str, str]]:
    """Checks the messages of a line. Raises ConfigError naming the field."""
    if not isinstance(value, list) or not value:
        raise ConfigError(f"messages={value!r:.80}: must be a list of objects with role and content, at least one")
    for index, message in enumerate(value):
        where = f"messages[{index}]"
        if not isinstance(message, Mapping):
            raise ConfigError(f"{where}={message!r:.80}: must be an object with role and content")
        refuse_unknown(message, ("role", "content"), f"{where}.")
        for name in ("role", "content"):
            if not isinstance(message.get(name), str):
                found = f"={message[name]!r:.80}: must be text" if name in message else " is missing: give text"
                raise ConfigError(f"{where}.{name}{found}")
    if value[0]["role"] == "assistant":
        raise ConfigError("messages[0].role='assistant': must be another role, such as 'user'")
    if all(message["role"] != "assistant" for message in value):
        raise ConfigError("messages: has no message with role 'assistant', which is what is trained")
    return value


def load_datasets(recipe: Recipe, encoder: Encoder) -> dict[str, Dataset]:
    """Reads the examples of every adapter.

    Raises:
      ConfigError: a file cannot be read or has bad lines, or an adapter has no example left to train or evaluate on.
    """
    return {name: _dataset(name, adapter, encoder) for name, adapter in recipe.adapters.items()}


def _dataset(name: str, adapter: AdapterRecipe, encoder: Encoder) -> Dataset:
    examples, warnings = encoder.read(adapter.data)
    held_out: list[Sample] = []
    if adapter.test is not None:
        held_out, more = encoder.read(adapter.test)
        warnings = (*warnings, *more)
    elif adapter.evaluation:
        order = np.random.default_rng([_SPLIT, adapter.seed]).permutation(len(examples))
        chosen = set(order[: max(1, round(adapter.evaluation * len(examples)))].tolist())
        held_out = [one for index, one in enumerate(examples) if index in chosen]
        examples = [one for index, one in enumerate(examples) if index not in chosen]
    for file, part, wanted in (
        (adapter.data, examples, True),
        (adapter.test or adapter.data, held_out, adapter.has_evaluation),
    ):
        if wanted and not part:
            purpose = "train" if part is examples else "evaluate"
            raise ConfigError(
                f"adapters.{name}: {file} leaves no example to {purpose} on; give more examples, or raise "
                f"max_length={encoder.max_length}"
            )
    return Dataset(examples, held_out, warnings)


def examples(samples: Sequence[Sample]) -> list[Example]:
    """Returns examples of the trainer whose losses sum to the mean over all trained tokens."""
    count = sum(one.num_trained for one in samples)
    return [
        Example(one.ids[:-1], one.ids[1:], one.trained[1:].astype(np.float32) / np.float32(count)) for one in samples
    ]
