"""Reads the header of a GGUF file: metadata and tensor offsets.

`gguf.GGUFReader` makes an array of every number and string, which takes seconds for a vocabulary; this takes 0.1 s.
"""

import dataclasses
import mmap
import struct
from pathlib import Path
from typing import TYPE_CHECKING, Any

from slora_jax.errors import CheckpointError

if TYPE_CHECKING:
    import numpy as np

_MAGIC = b"GGUF"
_VERSIONS = (2, 3)
_NUMBERS = {0: "u1", 1: "i1", 2: "<u2", 3: "<i2", 4: "<u4", 5: "<i4", 6: "<f4", 7: "?", 10: "<u8", 11: "<i8", 12: "<f8"}
_STRING, _ARRAY = 8, 9


@dataclasses.dataclass(frozen=True)
class TensorInfo:
    """One tensor as the header describes it.

    Attributes:
      name: GGUF name, e.g. "blk.0.attn_q.weight".
      shape: rows first, as in a Hugging Face checkpoint; the file stores the reverse.
      type_id: ggml's number of the tensor type.
      offset: first byte, from the beginning of the file.
    """

    name: str
    shape: tuple[int, ...]
    type_id: int
    offset: int


@dataclasses.dataclass(frozen=True)
class GgufHeader:
    """Metadata by key (numbers, strings, lists of strings, NumPy arrays of numbers) and tensors by GGUF name."""

    file: Path
    size: int
    metadata: dict[str, Any]
    tensors: dict[str, TensorInfo]


def gguf_file(model: str | Path) -> Path | None:
    """The GGUF file that `model` names: the path itself, or the only GGUF file of a directory without config.json.

    Returns None for other paths. Raises `CheckpointError` for a directory with several GGUF files.
    """
    path = Path(model)
    if path.is_dir():
        files = [] if (path / "config.json").exists() else sorted(path.glob("*.gguf"))
        if len(files) > 1:
            names = ", ".join(file.name for file in files)
            raise CheckpointError(f"{path}: {len(files)} GGUF files ({names}) and no config.json; name one of them")
        return files[0] if files else None
    return path if path.suffix.lower() == ".gguf" else None


def read_header(file: Path) -> GgufHeader:
    """Reads a header. Raises `CheckpointError` if the file is missing, damaged, or a part of a split model."""
    try:
        with open(file, "rb") as content, mmap.mmap(content.fileno(), 0, access=mmap.ACCESS_READ) as data:
            header = _Cursor(data).header(file)
    except FileNotFoundError:
        raise CheckpointError(f"{file}: no such file; expected a GGUF file") from None
    except (OSError, ValueError, OverflowError, struct.error) as error:
        raise CheckpointError(f"{file}: cannot be read as GGUF: {error}") from error
    parts = header.metadata.get("split.count", 0)
    if parts not in (0, 1):
        raise CheckpointError(
            f"{file}: split.count={parts} is not supported; supported: a model in one file (join its {parts} parts "
            "with llama-gguf-split --merge)"
        )
    return header


class _Cursor:
    """Reads consecutive little-endian values. Raises ValueError or struct.error at the end of the data."""

    def __init__(self, data: mmap.mmap) -> None:
        self._data, self._at = data, 0

    def header(self, file: Path) -> GgufHeader:
        if (magic := self._data[:4]) != _MAGIC:
            raise ValueError(f"it begins with {magic!r}; a GGUF file begins with {_MAGIC!r}")
        self._at = 4
        version = self._unpack("<I")
        if version not in _VERSIONS:
            kind = "version" if version & 0xFFFF else "big-endian version"
            raise ValueError(f"{kind} {version} is not supported; supported: little-endian versions 2 and 3")
        num_tensors, num_fields = self._unpack("<Q"), self._unpack("<Q")
        metadata: dict[str, Any] = {}
        for _ in range(num_fields):
            key = self._string()
            if key in metadata:
                raise ValueError(f"metadata {key} occurs twice")
            metadata[key] = self._value(self._unpack("<I"))
        raw_tensors = [self._tensor() for _ in range(num_tensors)]
        alignment = metadata.get("general.alignment", 32)
        if not isinstance(alignment, int) or alignment < 1:
            raise ValueError(f"general.alignment={alignment!r} is not a positive integer")
        start = -(-self._at // alignment) * alignment
        tensors: dict[str, TensorInfo] = {}
        for tensor in raw_tensors:
            if tensor.name in tensors:
                raise ValueError(f"tensor {tensor.name} occurs twice")
            tensors[tensor.name] = dataclasses.replace(tensor, offset=start + tensor.offset)
        return GgufHeader(file, len(self._data), metadata, tensors)

    def _tensor(self) -> TensorInfo:
        name = self._string()
        shape = tuple(self._unpack("<Q") for _ in range(self._unpack("<I")))
        return TensorInfo(name, shape[::-1], self._unpack("<I"), self._unpack("<Q"))

    def _value(self, type_id: int) -> Any:
        if type_id == _STRING:
            return self._string()
        if type_id != _ARRAY:
            return self._numbers(type_id, 1)[0].item()
        item_type, count = self._unpack("<I"), self._unpack("<Q")
        return self._strings(count) if item_type == _STRING else self._numbers(item_type, count)

    def _numbers(self, type_id: int, count: int) -> "np.ndarray":
        if type_id not in _NUMBERS:
            raise ValueError(f"metadata type {type_id} is unknown")
        import numpy as np

        numbers = np.frombuffer(self._data, _NUMBERS[type_id], count, self._at).copy()  # outlives the mmap
        self._at += numbers.nbytes
        return numbers

    def _strings(self, count: int) -> list[str]:
        data, at, strings = self._data, self._at, []
        unpack, size = struct.Struct("<Q").unpack_from, len(data)
        for _ in range(count):
            end = at + 8 + unpack(data, at)[0]
            if end > size:
                raise ValueError(f"truncated: it ends at byte {size}, within a string")
            strings.append(data[at + 8 : end].decode())
            at = end
        self._at = at
        return strings

    def _string(self) -> str:
        return self._strings(1)[0]

    def _unpack(self, form: str) -> int:
        (value,) = struct.unpack_from(form, self._data, self._at)
        self._at += struct.calcsize(form)
        return value
