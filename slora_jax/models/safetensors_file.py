"""Reads tensors of a safetensors file a few rows at a time."""

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open

from slora_jax.errors import CheckpointError

_ELEMENT_BYTES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2}


class SafetensorsTensors:
    """An open safetensors file; `tensors` is the result of `safe_open`.

    The text model of a larger one has the names that it would have alone: without "language_model.".
    """

    def __init__(self, file: Path, tensors: Any) -> None:
        self._file, self._tensors = file, tensors
        self._in_file = {name.replace("language_model.", "", 1): name for name in tensors.offset_keys()}

    def names(self) -> list[str]:
        """Tensor names in the order of the file."""
        return list(self._in_file)

    def name_in_file(self, name: str) -> str:
        return self._in_file.get(name, name)

    def get(self, name: str) -> "SafetensorsSlice":
        """Returns a lazy tensor. Raises `CheckpointError` for an unsupported dtype."""
        name = self._in_file[name]
        tensor = self._tensors.get_slice(name)
        if (dtype := tensor.get_dtype()) not in _ELEMENT_BYTES:
            supported = sorted(_ELEMENT_BYTES)
            raise CheckpointError(
                f"{self._file}: tensor {name}: dtype {dtype} is not supported; supported: {supported}"
            )
        return SafetensorsSlice(tensor, _ELEMENT_BYTES[dtype])


class SafetensorsSlice:
    """One tensor; indexing it reads that part, in the file's dtype."""

    def __init__(self, tensor: Any, element_bytes: int) -> None:
        self._tensor = tensor
        self.shape = tuple(tensor.get_shape())
        self.element_bytes = element_bytes

    def __getitem__(self, index: tuple[slice, ...]) -> np.ndarray:
        return self._tensor[index]


@contextlib.contextmanager
def open_safetensors(file: Path) -> Iterator[SafetensorsTensors]:
    """Memory-maps a file within the block; reports damage as `CheckpointError`."""
    try:
        with safe_open(file, framework="numpy") as tensors:
            yield SafetensorsTensors(file, tensors)
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{file}: cannot be read as safetensors: {error}") from error
