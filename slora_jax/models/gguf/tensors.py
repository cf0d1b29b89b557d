"""Reads tensors of a GGUF file by Hugging Face name and dequantises them a few rows at a time."""

import contextlib
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from slora_jax.errors import CheckpointError
from slora_jax.models.gguf.config import ROPE_FACTORS
from slora_jax.models.gguf.header import GgufHeader, TensorInfo, read_header
from slora_jax.models.projections import PROJECTIONS

TENSOR_TYPES = (
    "F32", "F16", "BF16", "Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K",
)  # fmt: skip
"""Supported tensor types, by ggml's names."""

_HF_NAMES = {
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "output": "lm_head",
}
_HF_LAYER_NAMES = {
    "attn_norm": "input_layernorm",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "ffn_norm": "post_attention_layernorm",
    **{projection.gguf: projection.module for projection in PROJECTIONS.values()},
}
_GGUF_NAMES = {hf: gguf for gguf, hf in (_HF_NAMES | _HF_LAYER_NAMES).items()}
_LAYER_TENSOR = re.compile(r"blk\.(\d+)\.(\w+)\.(weight|bias)")
_READ_ELSEWHERE = re.compile(re.escape(ROPE_FACTORS) + r"|blk\.\d+\.attn_rot_embd(\.weight)?")  # or computed
_PERMUTED_FAMILIES = ("llama", "mistral")  # llama.cpp rotates adjacent pairs in these, halves in the others


def hf_name(name: str) -> str:
    """The Hugging Face name of a GGUF tensor; the name itself if it is unknown."""
    if match := _LAYER_TENSOR.fullmatch(name):
        layer, part, kind = match.groups()
        return f"model.layers.{layer}.{_HF_LAYER_NAMES[part]}.{kind}" if part in _HF_LAYER_NAMES else name
    part, _, kind = name.rpartition(".")
    return f"{_HF_NAMES[part]}.{kind}" if part in _HF_NAMES else name


def gguf_name(name: str) -> str:
    """The GGUF name of a tensor by its Hugging Face name; the name itself if it is unknown."""
    part, _, kind = name.rpartition(".")
    if match := re.fullmatch(r"model\.layers\.(\d+)\.(.+)", part):
        return f"blk.{match[1]}.{_GGUF_NAMES[match[2]]}.{kind}" if match[2] in _GGUF_NAMES else name
    return f"{_GGUF_NAMES[part]}.{kind}" if part in _GGUF_NAMES else name


class GgufTensors:
    """An open GGUF file; `data` is the whole file as memory-mapped bytes."""

    def __init__(self, header: GgufHeader, data: np.ndarray) -> None:
        self._header, self._data = header, data

    def names(self) -> list[str]:
        """Hugging Face names in the order of the file, without tensors that are read elsewhere or computed."""
        infos = sorted(self._header.tensors.values(), key=lambda info: info.offset)
        return [hf_name(info.name) for info in infos if not _READ_ELSEWHERE.fullmatch(info.name)]

    def name_in_file(self, name: str) -> str:
        return gguf_name(name)

    def get(self, name: str) -> "GgufSlice":
        """Returns a lazy tensor by Hugging Face name. Raises `CheckpointError` if its type is unsupported or the file
        is truncated."""
        info = self._header.tensors.get(gguf_name(name)) or self._header.tensors[name]
        return GgufSlice(self._header, self._data, info)


class GgufSlice:
    """One quantised tensor, in the row order of Hugging Face checkpoints; indexing it returns float32.

    Attributes:
      shape: rows first.
      element_bytes: bytes of one element in the file; a fraction for packed types.
    """

    def __init__(self, header: GgufHeader, data: np.ndarray, info: TensorInfo) -> None:
        import gguf  # takes 0.1 s

        self.shape = info.shape
        kind = {kind.value: kind for kind in gguf.GGMLQuantizationType}.get(info.type_id)
        where = f"{header.file}: tensor {info.name}"
        if kind is None or kind.name not in TENSOR_TYPES:
            found = info.type_id if kind is None else kind.name
            raise CheckpointError(
                f"{where}: type {found} is not supported; supported: {', '.join(TENSOR_TYPES)} (llama-quantize "
                "--allow-requantize writes them)"
            )
        self._type = kind
        self._block, self._block_bytes = gguf.GGML_QUANT_SIZES[kind]
        self.element_bytes = self._block_bytes / self._block
        if not 1 <= len(self.shape) <= 2 or self.shape[-1] % self._block:
            raise CheckpointError(
                f"{where}: shape {self.shape}: must have 1 or 2 axes, the last one a multiple of {self._block}"
            )
        rows = self.shape[0] if len(self.shape) == 2 else 1
        row_bytes = self.shape[-1] // self._block * self._block_bytes
        end = info.offset + rows * row_bytes
        if end > header.size:
            raise CheckpointError(f"{where}: truncated: it ends at byte {end}, the file at byte {header.size}")
        self._rows = data[info.offset : end].reshape(rows, row_bytes)
        self._order = self._head_order(header, info.name)

    def __getitem__(self, index: tuple[slice, ...]) -> np.ndarray:
        """Returns float32 `[rows]` or `[rows, columns]` for slices of step 1 within the shape."""
        if len(self.shape) == 1:  # a norm or a bias
            values = self._dequantised(self._rows)[0]
            return (values if self._order is None else values[self._order])[index]
        rows, columns = index if len(index) == 2 else (index[0], slice(0, self.shape[1]))
        first, last = columns.start // self._block, -(-columns.stop // self._block)  # blocks with these columns
        packed = self._rows[rows if self._order is None else self._order[rows]]
        values = self._dequantised(packed[:, first * self._block_bytes : last * self._block_bytes])
        skipped = first * self._block
        return values[:, columns.start - skipped : columns.stop - skipped]

    def _dequantised(self, packed: np.ndarray) -> np.ndarray:
        from gguf import dequantize

        return dequantize(np.ascontiguousarray(packed), self._type)

    def _head_order(self, header: GgufHeader, name: str) -> np.ndarray | None:
        """The file's row index of each row, or None if the orders agree.

        In permuted families, the two rows of a rotated pair are adjacent in the file, but half a head apart in a
        Hugging Face checkpoint.
        """
        family, match = header.metadata["general.architecture"], _LAYER_TENSOR.fullmatch(name)
        if family not in _PERMUTED_FAMILIES or not match or match[2] not in ("attn_q", "attn_k"):
            return None
        heads = header.metadata[f"{family}.attention.head_count"]
        if match[2] == "attn_k":
            heads = header.metadata.get(f"{family}.attention.head_count_kv", heads)
        heads = int(np.max(heads))  # one number, or the same one for each layer
        if self.shape[0] % (2 * heads):
            raise CheckpointError(
                f"{header.file}: tensor {name}: {self.shape[0]} rows: must be a multiple of {2 * heads}"
            )
        return np.arange(self.shape[0]).reshape(heads, -1, 2).swapaxes(1, 2).reshape(-1)


@contextlib.contextmanager
def open_gguf(file: Path) -> Iterator[GgufTensors]:
    """Memory-maps a file within the block. Raises `CheckpointError` like `read_header`."""
    header = read_header(file)
    data: Any = np.memmap(file, np.uint8, mode="r")
    yield GgufTensors(header, np.asarray(data))
