"""Adapters' changes of the output head and the token embedding, as LoRA of low rank on both.

LoRA is read as it is. A changed row of the embedding or of the head (a trained token, a matrix saved whole) becomes one
rank: the row's difference from the base model's, and the token's unit vector. A matrix saved whole is often the base
model's own, or differs in a few added tokens. With more changed rows than `MAX_RANK` it is refused: its size is that of
the base model's matrix for every adapter.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Protocol

import numpy as np

from slora_jax.adapters.config import MAX_RANK, LoraConfig
from slora_jax.adapters.targets import Target
from slora_jax.adapters.tensor_names import TensorName
from slora_jax.adapters.untrusted.quoting import clipped, quoted
from slora_jax.adapters.untrusted.tensor_file import DTYPES, TensorFile
from slora_jax.errors import AdapterError

MODULES = {"lm_head": "head", "embed_tokens": "embed"}
"""Each end by the name of its module."""

KINDS = {
    "lm_head": ("lora_A", "lora_B", "weight", "trainable_tokens_delta"),
    "embed_tokens": ("lora_embedding_A", "lora_embedding_B", "weight", "trainable_tokens_delta"),
}
"""Kinds of tensors that are read, by module."""

End = tuple[np.ndarray, np.ndarray]
"""A `[r, d_in]` and scaled B `[d_out, r]`, float32."""


class Vocabulary(Protocol):
    """The base model's embedding and head."""

    @property
    def is_tied(self) -> bool:
        """True if the head is the embedding."""

    def rows(self, end: str) -> np.ndarray:
        """The matrix of "embed" or "head", `[vocab, d]`."""


class EndsReader:
    """Reads the tensors outside the layers of one adapter file.

    Args:
      names: the tensors outside the layers, by name in the file.
      targets: LoRA targets, by module.
    """

    def __init__(
        self,
        file: TensorFile,
        names: Mapping[str, TensorName],
        targets: Mapping[str, Target],
        config: LoraConfig,
        hidden_size: int,
        vocab_size: int,
    ) -> None:
        self._file, self._targets, self._config = file, targets, config
        self._hidden, self._vocab = hidden_size, vocab_size
        self._names: dict[tuple[str, str], str] = {}
        for name, found in names.items():
            if (other := self._names.setdefault((found.module, found.kind), name)) != name:
                raise AdapterError(f"{file.path}: tensors {quoted(other)} and {quoted(name)} are the same weight twice")

    def check(self) -> dict[str, int]:
        """Checks names, shapes and dtypes. Returns the rank of each end that is known before weights are read.

        Raises:
          AdapterError: a tensor is missing, or has another shape than the base model's vocabulary.
        """
        ranks: dict[str, int] = {}
        for module, target in self._targets.items():
            shapes = [target.rank, self._hidden], [self._vocab, target.rank]
            if module == "embed_tokens":
                shapes = [target.rank, self._vocab], [self._hidden, target.rank]
            for kind, shape in zip(KINDS[module][:2], shapes, strict=True):
                self._check(module, kind, shape)
            ranks[MODULES[module]] = target.rank
        saved = [module for module, kind in self._names if kind == "weight"]
        for module in dict.fromkeys([*saved, *(self._config.modules_to_save or ())]):
            self._check(module, "weight", [self._vocab, self._hidden])
            ranks.setdefault(MODULES[module], 0)
        for module, tokens in self._config.tokens.items():
            self._check(module, "trainable_tokens_delta", [len(tokens), self._hidden])
            ranks[MODULES[module]] = ranks.get(MODULES[module], 0) + len(tokens)
            if not 0 <= min(tokens) <= max(tokens) < self._vocab:
                raise AdapterError(
                    f"trainable_token_indices: must be in 0..{self._vocab - 1}, found {quoted(list(tokens))}"
                )
        return ranks

    def read(self, base: Vocabulary) -> dict[str, End]:
        """Reads the ends.

        Raises:
          AdapterError: a value is not finite, or more than `MAX_RANK` rows of a matrix differ from the base model's.
        """
        parts: dict[str, list[End]] = {}
        for module, target in self._targets.items():
            a, b = (self._read(module, kind) for kind in KINDS[module][:2])
            parts.setdefault(MODULES[module], []).append((a, b * np.float32(target.scale)))
        for module, tokens in self._config.tokens.items():
            rows = self._read(module, "trainable_tokens_delta")
            ends = ["embed", "head"] if module == "embed_tokens" and base.is_tied else [MODULES[module]]
            for end in ends:
                ids = np.array(tokens)
                parts.setdefault(end, []).append(_changed_rows(end, ids, rows, base.rows(end)))
        for module, kind in self._names:
            if kind == "weight":
                # A matrix that PEFT saves although it is no trained module is loaded into the base model itself.
                is_module = module in (self._config.modules_to_save or ())
                ends = ["embed", "head"] if base.is_tied and not is_module else [MODULES[module]]
                for end in ends:
                    if (part := self._whole(module, end, base)) is not None:
                        parts.setdefault(end, []).append(part)
        return {end: _joined(own) for end, own in parts.items()}

    def _whole(self, module: str, end: str, base: Vocabulary) -> End | None:
        """The rows of a matrix saved whole that differ from the base model's; None if there are none."""
        name = self._names[module, "weight"]
        new, old = self._file.read(name), base.rows(end)
        kind = new.dtype if new.dtype.itemsize < old.dtype.itemsize else old.dtype
        changed = np.flatnonzero((new.astype(kind, copy=False) != old.astype(kind, copy=False)).any(1))
        if len(changed) > MAX_RANK:
            raise AdapterError(
                f"{self._file.path}: tensor {quoted(name)}: {len(changed)} of its {self._vocab} rows differ from the "
                f"base model's, and at most {MAX_RANK} are served; the whole matrix would take {new.nbytes} bytes of "
                f"the pool. Train {module} by LoRA (target_modules), or single tokens (trainable_token_indices)"
            )
        return _changed_rows(end, changed, new[changed].astype(np.float32), old) if len(changed) else None

    def _check(self, module: str, kind: str, shape: Sequence[int]) -> None:
        name = self._names.get((module, kind))
        if name is None:
            raise AdapterError(
                f"{self._file.path}: missing tensor {kind} of {module}, which adapter_config.json asks for"
            )
        entry = self._file.entries[name]
        if entry.dtype not in DTYPES:
            raise AdapterError(
                f"{self._file.path}: tensor {quoted(name)}: expected {', '.join(DTYPES)}, found {clipped(entry.dtype)}"
            )
        if entry.shape != list(shape):
            raise AdapterError(
                f"{self._file.path}: tensor {quoted(name)}: expected shape {list(shape)}, found {entry.shape}: the "
                "rank differs, or the adapter was trained on another base model, or with a resized vocabulary"
            )

    def _read(self, module: str, kind: str) -> np.ndarray:
        name = self._names[module, kind]
        matrix = np.asarray(self._file.read(name), np.float32)
        if not np.isfinite(matrix).all():
            raise AdapterError(
                f"{self._file.path}: tensor {quoted(name)}: expected finite values, found NaN or infinity"
            )
        return matrix


def _changed_rows(end: str, tokens: np.ndarray, new: np.ndarray, old: np.ndarray) -> End:
    """Replaces the rows of `tokens` by `new [n, d]`; `old` is the base model's matrix `[vocab, d]`."""
    units = np.zeros((len(tokens), len(old)), np.float32)
    units[np.arange(len(tokens)), tokens] = 1
    change = new - old[tokens].astype(np.float32)
    return (change, units.T) if end == "head" else (units, change.T)


def _joined(parts: Sequence[End]) -> End:
    """The sum of several updates."""
    return np.concatenate([a for a, _ in parts]), np.concatenate([b for _, b in parts], 1)
