"""Reads the kernels of a quantised checkpoint by the names that they would have unquantised, a few rows at a time."""

from __future__ import annotations

import contextlib
import json
import math
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import jax.numpy as jnp
import numpy as np

from slora_jax.errors import CheckpointError
from slora_jax.models.quantised import group_size, quantise
from slora_jax.models.quantised_config import CheckpointFormat
from slora_jax.models.safetensors_file import SafetensorsSlice, SafetensorsTensors, open_safetensors
from slora_jax.models.traits import WeightFormat

_DTYPES = {
    "F32": np.float32, "F16": np.float16, "BF16": jnp.bfloat16, "F8_E4M3": jnp.float8_e4m3fn,
    "I64": np.int64, "I32": np.int32, "I8": np.int8, "U8": np.uint8,
}  # fmt: skip
_PARTS = {
    "packed": ("weight_packed", "weight_scale", "weight_shape"),
    "int": ("weight", "weight_scale"),
    "float": ("weight", "weight_scale"),
    "fp8": ("weight", "weight_scale_inv"),
    "gptq": ("qweight", "qzeros", "scales", "g_idx"),
    "awq": ("qweight", "qzeros", "scales"),
    "nf4": (
        "weight", "weight.absmax", "weight.quant_map", "weight.nested_absmax", "weight.nested_quant_map",
        "weight.quant_state.bitsandbytes__nf4",
    ),
}  # fmt: skip
"""Tensors of one kernel by packing, after the module's name."""
_MARKS = {"packed": 0, "int": 1, "float": 1, "fp8": 1, "gptq": 0, "awq": 0, "nf4": 1}
"""Index in `_PARTS` of the tensor that only quantised modules have."""
_UNUSED = ("input_scale", "weight_zero_point", "activation_scale", "k_scale", "v_scale")
"""Suffixes of tensors of quantised activations, which are not read; zero points are checked."""
_AWQ_ORDER = np.array([0, 4, 1, 5, 2, 6, 3, 7])  # nibble of each of eight neighbouring outputs

Codes = Callable[[slice], tuple[np.ndarray, np.ndarray]]
"""Returns codes float32 `[n, d_in]` and scales float32 `[n, k]` of some outputs."""


class QuantisedTensors:
    """The tensors of a quantised checkpoint; `files` are open."""

    def __init__(self, directory: Path, files: Mapping[Path, SafetensorsTensors], form: CheckpointFormat) -> None:
        self._directory, self._form = directory, form
        self._files, self._raw = files, {file: _RawTensors(file) for file in files}
        in_file = {
            tensors.name_in_file(name): (file, name) for file, tensors in files.items() for name in tensors.names()
        }
        self._home = {name: file for file, name in in_file.values()}
        self._full_name = {name: full for full, (_, name) in in_file.items()}
        mark = "." + _PARTS[form.packing][_MARKS[form.packing]]
        self._modules = [name.removesuffix(mark) for name in self._home if name.endswith(mark)]
        parts = {f"{module}.{part}" for module in self._modules for part in _PARTS[form.packing]}
        parts |= {f"{module}.{part}" for module in self._modules for part in _UNUSED}
        self._plain = [name for name in self._home if name not in parts]

    def names(self) -> list[str]:
        """Names of the unquantised checkpoint's tensors."""
        return self._plain + [f"{module}.weight" for module in self._modules]

    @property
    def unquantised(self) -> list[str]:
        """Names of the tensors that are stored as they are."""
        return self._plain

    def name_in_file(self, name: str) -> str:
        return self._full_name.get(name, name)

    def get(self, name: str) -> SafetensorsSlice | QuantisedSlice:
        """Returns a lazy tensor. Raises `CheckpointError` if it is damaged."""
        module = name.removesuffix(".weight")
        if name in self._home and name in self._plain:
            return self._files[self._home[name]].get(name)
        try:
            return self._kernel(module)
        except CheckpointError as error:
            raise CheckpointError(f"{self._directory}: {module}: {error}") from None

    def _part(self, module: str, part: str) -> np.ndarray:
        name = f"{module}.{part}"
        if name not in self._home:
            raise CheckpointError(f"tensor {name} is missing, which quantization_config needs")
        return self._raw[self._home[name]].get(self._full_name[name])

    def _kernel(self, module: str) -> QuantisedSlice:
        form = self._form
        if f"{module}.weight_zero_point" in self._home and np.any(self._part(module, "weight_zero_point")):
            raise CheckpointError("weight_zero_point is not 0; must be symmetric")
        return {
            "packed": self._packed, "int": self._plain_codes, "float": self._plain_codes, "fp8": self._plain_codes,
            "gptq": self._gptq, "awq": self._awq, "nf4": self._nf4,
        }[form.packing](module)  # fmt: skip

    def _packed(self, module: str) -> QuantisedSlice:
        words, scale = self._part(module, "weight_packed"), self._part(module, "weight_scale")
        d_out, d_in = map(int, self._part(module, "weight_shape"))
        bits = self._form.bits
        _require_shape("weight_packed", words, (d_out, -(-d_in * bits // 32)))
        scales = self._scales(scale, d_out, d_in)

        def codes(rows: slice) -> tuple[np.ndarray, np.ndarray]:
            return _unpacked(words[rows], bits)[:, :d_in] - np.float32(1 << (bits - 1)), scales(rows)

        return QuantisedSlice((d_out, d_in), bits / 8, codes, self._form)

    def _plain_codes(self, module: str) -> QuantisedSlice:
        form = self._form
        weight, scale = (self._part(module, part) for part in _PARTS[form.packing])
        expected = np.dtype(np.int8 if form.packing == "int" else jnp.float8_e4m3fn)
        if weight.dtype != expected or weight.ndim != 2:
            raise CheckpointError(f"weight: must be a matrix of {expected}, found {weight.dtype} {weight.shape}")
        scales = self._scales(scale, *weight.shape)
        return QuantisedSlice(
            (weight.shape[0], weight.shape[1]), 1, lambda rows: (weight[rows].astype(np.float32), scales(rows)), form
        )

    def _scales(self, scale: np.ndarray, d_out: int, d_in: int) -> Callable[[slice], np.ndarray]:
        """Returns a function: the scales float32 `[n, k]` of some outputs."""
        block, size = self._form.block, self._form.group
        if scale.size == 1 and not block:
            scale = np.broadcast_to(scale.reshape(1, 1), (d_out, 1))
        elif scale.ndim == 1:
            scale = scale[:, None]
        outputs = -(-d_out // block) if block else d_out
        _require_shape("weight_scale", scale, (outputs, -(-d_in // size) if size else 1))

        def rows_of(rows: slice) -> np.ndarray:
            index = np.arange(rows.start, rows.stop)
            return scale[index // block if block else index].astype(np.float32)

        return rows_of

    def _gptq(self, module: str) -> QuantisedSlice:
        words, zeros, scales = (self._part(module, part) for part in ("qweight", "qzeros", "scales"))
        bits = self._form.bits
        d_in, d_out = words.shape[0] * 32 // bits, words.shape[1]
        size = self._form.group or d_in
        groups = -(-d_in // size)
        _require_shape("scales", scales, (groups, d_out))
        _require_shape("qzeros", zeros, (groups, d_out * bits // 32))
        if self._form.is_reordered or f"{module}.g_idx" in self._home:
            order = np.asarray(self._part(module, "g_idx"))
            if order.shape != (d_in,) or (order != np.arange(d_in) // size).any():
                raise CheckpointError(
                    "g_idx: inputs are not in the order of their groups (desc_act=true), which is not supported; "
                    "quantise with desc_act=false"
                )
        offset = 0 if self._form.method == "gptq_v2" else 1
        zero = _unpacked(zeros, bits) + np.float32(offset)  # [groups, d_out]

        def codes(rows: slice) -> tuple[np.ndarray, np.ndarray]:
            own = _unpacked(np.ascontiguousarray(words[:, rows].T), bits)  # [n, d_in]
            return own - np.repeat(zero[:, rows].T, size, 1)[:, :d_in], scales[:, rows].T.astype(np.float32)

        return QuantisedSlice((d_out, d_in), bits / 8, codes, self._form)

    def _awq(self, module: str) -> QuantisedSlice:
        words, zeros, scales = (self._part(module, part) for part in ("qweight", "qzeros", "scales"))
        d_in, d_out = words.shape[0], words.shape[1] * 8
        size = self._form.group or d_in
        groups = -(-d_in // size)
        _require_shape("scales", scales, (groups, d_out))
        _require_shape("qzeros", zeros, (groups, d_out // 8))

        def unpacked(words: np.ndarray) -> np.ndarray:
            codes = _unpacked(words, 4)
            return codes.reshape(len(words), -1, 8)[:, :, _AWQ_ORDER].reshape(codes.shape)

        zero = unpacked(zeros)

        def codes(rows: slice) -> tuple[np.ndarray, np.ndarray]:
            first = rows.start // 8
            own = unpacked(words[:, first : -(-rows.stop // 8)])[:, rows.start - 8 * first : rows.stop - 8 * first]
            return (own - np.repeat(zero[:, rows], size, 0)[:d_in]).T, scales[:, rows].T.astype(np.float32)

        return QuantisedSlice((d_out, d_in), 0.5, codes, self._form)

    def _nf4(self, module: str) -> QuantisedSlice:
        parts = _PARTS["nf4"]
        packed, absmax, table = (self._part(module, part) for part in parts[:3])
        state = json.loads(bytes(self._part(module, parts[5])))
        d_out, d_in = state["shape"]
        block = state["blocksize"]
        if d_in % block:
            raise CheckpointError(f"blocksize={block}: must divide the {d_in} inputs")
        if packed.size * 2 != d_out * d_in or absmax.size * block != d_out * d_in:
            raise CheckpointError(
                f"weight, absmax: sizes {packed.size}, {absmax.size} do not fit shape {state['shape']}"
            )
        if absmax.dtype == np.uint8:
            outer, levels = (self._part(module, part).astype(np.float32) for part in parts[3:5])
            size = state["nested_blocksize"]
            absmax = levels[absmax] * np.repeat(outer, size)[: absmax.size] + np.float32(state["nested_offset"])
        scale = absmax.reshape(d_out, d_in // block).astype(np.float32)
        packed, table = packed.reshape(d_out, d_in // 2), table.astype(np.float32)

        def codes(rows: slice) -> tuple[np.ndarray, np.ndarray]:
            own = packed[rows]  # the first of two codes is in the high half
            return table[np.stack([own >> 4, own & 15], -1)].reshape(len(own), d_in), scale[rows]

        return QuantisedSlice((d_out, d_in), 0.5, codes, self._form)


class QuantisedSlice:
    """One kernel `[d_out, d_in]`; indexing it returns float32.

    Attributes:
      element_bytes: bytes of one code in the file.
    """

    def __init__(self, shape: tuple[int, int], element_bytes: float, codes: Codes, form: CheckpointFormat) -> None:
        self.shape, self.element_bytes = shape, element_bytes
        self._codes, self._form = codes, form

    def __getitem__(self, index: tuple[slice, ...]) -> np.ndarray:
        codes, scale = self._codes(index[0])
        size = -(-self.shape[1] // scale.shape[1]) if not self._form.group else self._form.group
        return (codes * np.repeat(scale, size, 1)[:, : self.shape[1]])[:, index[1]]

    def quantised(self, rows: slice, inputs: slice, weights: WeightFormat) -> tuple[np.ndarray, np.ndarray] | None:
        """Returns the codes and scales of a part, as `quantise` does; None if the checkpoint has no such codes."""
        form = self._form
        if not form.is_kept or form.weights != weights:
            return None
        codes, scale = self._codes(rows)
        codes = codes[:, inputs]
        if not np.isfinite(codes).all():  # fp8 has NaN
            raise FloatingPointError("expected finite codes, found NaN")
        if weights == "int4":
            own = group_size(inputs.stop - inputs.start)  # divides the checkpoint's groups, or all inputs share a scale
            scale = np.repeat(scale, (form.group or self.shape[1]) // own, 1)[
                :, inputs.start // own : inputs.stop // own
            ]
        kept, _ = quantise(np.zeros((1, own if weights == "int4" else 1), np.float32), weights)
        return codes.astype(kept.dtype), scale


class _RawTensors:
    """Memory-maps tensors of any dtype in a safetensors file, whose header is valid."""

    def __init__(self, file: Path) -> None:
        self._file = file
        with file.open("rb") as content:
            size = int.from_bytes(content.read(8), "little")
            self._header = json.loads(content.read(size))
        self._start = 8 + size

    def get(self, name: str) -> np.ndarray:
        info = self._header[name]
        if info["dtype"] not in _DTYPES:
            raise CheckpointError(
                f"tensor {name}: dtype {info['dtype']} is not supported; supported: {sorted(_DTYPES)}"
            )
        dtype, shape = np.dtype(_DTYPES[info["dtype"]]), tuple(info["shape"])
        if not math.prod(shape):
            return np.zeros(shape, dtype)
        raw = np.memmap(
            self._file, np.uint8, "r", self._start + info["data_offsets"][0], math.prod(shape) * dtype.itemsize
        )
        return raw.view(dtype).reshape(shape)


def _unpacked(words: np.ndarray, bits: int) -> np.ndarray:
    """Unsigned codes of int32 words, the lowest bits first: float32 `[n, words * 32 / bits]`."""
    shifts = np.arange(0, 32, bits, dtype=np.uint32)
    codes = (words.view(np.uint32)[..., None] >> shifts) & np.uint32((1 << bits) - 1)
    return codes.reshape(*words.shape[:-1], -1).astype(np.float32)


def _require_shape(part: str, found: np.ndarray, expected: tuple[int, ...]) -> None:
    if found.shape != expected:
        raise CheckpointError(f"{part}: expected shape {expected}, found {found.shape}")


@contextlib.contextmanager
def open_quantised(directory: Path, files: list[Path], form: CheckpointFormat) -> Iterator[QuantisedTensors]:
    """Opens the weight files of a quantised checkpoint within the block; reports damage as `CheckpointError`."""
    with contextlib.ExitStack() as opened:
        yield QuantisedTensors(directory, {f: opened.enter_context(open_safetensors(f)) for f in files}, form)
