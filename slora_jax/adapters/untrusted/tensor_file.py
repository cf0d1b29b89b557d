"""Reads untrusted safetensors files without mapping them: truncating a mapped file would kill the process (SIGBUS)."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import ml_dtypes  # noqa: F401  (registers bfloat16 with NumPy)
import numpy as np

from slora_jax.adapters.untrusted.plain_file import open_plain
from slora_jax.adapters.untrusted.quoting import quoted
from slora_jax.errors import AdapterError

DTYPES = {"F16": "float16", "BF16": "bfloat16", "F32": "float32"}
"""Supported element types: safetensors' name -> NumPy's."""

MAX_HEADER = 8 << 20
"""Longest header, in bytes. Adapters of the largest models need 300 kB, and 6 MB with modules for each of 128 experts
in 48 layers. The format allows 100 MB, but parsing that takes a GB and holds the interpreter's lock for seconds."""


@dataclass(frozen=True)
class TensorEntry:
    """A tensor's header entry; `begin` and `end` are byte offsets in the file."""

    dtype: str
    shape: list[int]
    begin: int
    end: int


class TensorFile:
    """An open safetensors file with a checked header: `entries`, by name, cover the file without gap or overlap."""

    def __init__(self, path: Path) -> None:
        """Raises AdapterError if the file cannot be opened or its header is not valid."""
        self.path = path
        try:
            self._file = open_plain(path)
        except FileNotFoundError:
            raise AdapterError(f"{path}: no such file") from None
        try:
            self.entries = self._read_header()
        except (OSError, ValueError, RecursionError) as error:
            self._file.close()
            raise AdapterError(f"{path}: not a valid safetensors file: {error}") from None
        except BaseException:
            self._file.close()
            raise

    def read(self, name: str) -> np.ndarray:
        """Reads a tensor whose dtype is in `DTYPES`. Raises AdapterError if the file was truncated or is unreadable."""
        entry = self.entries[name]
        array = np.empty(entry.shape, DTYPES[entry.dtype])
        try:
            self._file.seek(entry.begin)
            count = self._file.readinto(array.reshape(-1).view(np.uint8).data) if array.size else 0
        except OSError as error:
            raise AdapterError(f"{self.path}: cannot be read: {error}") from error
        if count != array.nbytes:
            raise AdapterError(f"{self.path}: tensor {quoted(name)}: the file was truncated while it was read")
        return array

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.close()

    def _read_header(self) -> dict[str, TensorEntry]:
        size = os.fstat(self._file.fileno()).st_size
        length = int.from_bytes(self._file.read(8), "little")
        if not 2 <= length <= min(MAX_HEADER, size - 8):
            raise ValueError(f"its header must have 2 to {MAX_HEADER} bytes and lie in the file, which has {size}")
        header = json.loads(self._file.read(length).decode(), object_pairs_hook=_without_duplicates)
        if not isinstance(header, dict):
            raise ValueError(f"the header is {type(header).__name__}, not an object")
        header.pop("__metadata__", None)
        entries = {name: _entry(name, fields, 8 + length) for name, fields in header.items()}
        end = 8 + length
        for name, entry in sorted(entries.items(), key=lambda item: (item[1].begin, item[1].end)):
            if entry.begin != end:
                raise ValueError(f"tensor {quoted(name)} begins at byte {entry.begin}, not {end}")
            end = entry.end
        if end != size:
            raise ValueError(f"the tensors end at byte {end} of {size}")
        return entries


def _entry(name: str, fields: Any, first: int) -> TensorEntry:
    """Raises ValueError if a field is missing or malformed, or the byte count does not match shape and dtype."""
    if not isinstance(fields, Mapping) or fields.keys() != {"dtype", "shape", "data_offsets"}:
        raise ValueError(f"tensor {quoted(name)} does not have exactly the fields dtype, shape, data_offsets")
    dtype, shape, offsets = fields["dtype"], fields["shape"], fields["data_offsets"]
    if not isinstance(dtype, str) or not _are_sizes(shape) or not _are_sizes(offsets) or len(offsets) != 2:
        raise ValueError(f"tensor {quoted(name)} has a malformed dtype, shape or data_offsets")
    begin, end = offsets
    if begin > end or (dtype in DTYPES and math.prod(shape) * np.dtype(DTYPES[dtype]).itemsize != end - begin):
        raise ValueError(f"tensor {quoted(name)} of shape {shape} and dtype {quoted(dtype)} in bytes {begin} to {end}")
    return TensorEntry(dtype, shape, first + begin, first + end)


def _are_sizes(value: Any) -> bool:
    return isinstance(value, list) and len(value) <= 8 and all(type(n) is int and 0 <= n < 2**63 for n in value)


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        raise ValueError("a name occurs twice")
    return result
