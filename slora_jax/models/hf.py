"""Reads weights from a Hugging Face directory or GGUF file into the decoder's fused `[in, out]` parameters.

Every header is checked against the config before the first weight is read. Tensors are then read in blocks of rows,
written directly into the fused parameter, and uploaded when its last part is complete. Host memory beyond the
parameters themselves (on the CPU backend the buffers *are* the device arrays) is one block. With several shards, each
process reads only its own devices' parts, and no device ever holds more than its part.
"""

import dataclasses
import math
import re
import warnings
from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax import traverse_util
from tqdm import tqdm

from slora_jax.errors import CheckpointError
from slora_jax.models.config import ModelConfig, read_json
from slora_jax.models.decoder import Params, model_dtype
from slora_jax.models.families.registry import FAMILIES
from slora_jax.models.gguf.header import gguf_file
from slora_jax.models.gguf.tensors import GgufSlice, GgufTensors, open_gguf
from slora_jax.models.init import abstract_decoder
from slora_jax.models.placements import EMBEDDING, HEAD, ParamPath, Placement, tensor_placements
from slora_jax.models.quantised import quantise, scale_path
from slora_jax.models.quantised_checkpoint import QuantisedSlice, QuantisedTensors, open_quantised
from slora_jax.models.quantised_config import CheckpointFormat, checkpoint_format
from slora_jax.models.rotary import inverse_frequencies
from slora_jax.models.safetensors_file import SafetensorsSlice, SafetensorsTensors, open_safetensors
from slora_jax.parallel.mesh import TensorParallel, parameter_spec, whole_shape

Tensor = SafetensorsSlice | GgufSlice | QuantisedSlice

_BLOCK_BYTES = 1 << 20
_ALIGNMENT = 64  # bytes; the CPU backend uses an aligned buffer without copying it
_ROTARY_BUFFER = re.compile(r"model\.(layers\.\d+\.self_attn\.)?rotary_emb\.inv_freq")


def checkpoint_files(model_dir: str | Path) -> list[Path]:
    """The weight files of a checkpoint: a GGUF file, `model.safetensors`, or the files named by its index, sorted.

    Raises `CheckpointError` if there is none, if a file is missing, or if the directory has only pickled weights.
    """
    if file := gguf_file(model_dir):
        return [file]
    model_dir = Path(model_dir)
    single, index = model_dir / "model.safetensors", model_dir / "model.safetensors.index.json"
    if single.exists():
        return [single]
    if index.exists():
        weight_map = read_json(index).get("weight_map")
        if not isinstance(weight_map, dict) or not weight_map:
            raise CheckpointError(f"{index}: weight_map is missing or empty")
        files = [model_dir / name for name in sorted(set(weight_map.values()))]
        if missing := [file.name for file in files if not file.exists()]:
            raise CheckpointError(f"{model_dir}: shards named by {index.name} are missing: {', '.join(missing)}")
        return files
    if any(model_dir.glob("*.bin")):
        raise CheckpointError(
            f"{model_dir}: only pickled weights (*.bin) found; they are refused because reading them can run code; "
            "convert the checkpoint to safetensors (transformers: save_pretrained)"
        )
    raise CheckpointError(f"{model_dir}: neither {single.name} nor {index.name} found")


def untied_if_heads_differ(model_dir: str | Path, config: ModelConfig, dtype: Any) -> ModelConfig:
    """Returns the config to load a checkpoint with.

    If the config ties the embeddings but the checkpoint has an output head with other values (in `dtype`), the head is
    used, as in transformers: the result is untied, and a warning says so.

    Raises `CheckpointError` for missing or damaged files.
    """
    if not config.tie_word_embeddings:
        return config
    with ExitStack() as opened:
        found: dict[str, Tensor] = {}
        for file in _sources(model_dir):
            tensors = opened.enter_context(_open(file))
            found |= {name: tensors.get(name) for name in {EMBEDDING, HEAD}.intersection(tensors.names())}
        if len(found) < 2 or _are_equal(found[EMBEDDING], found[HEAD], model_dtype(dtype)):
            return config
    warnings.warn(
        f"{model_dir}: config.json: tie_word_embeddings=true, but {HEAD} and {EMBEDDING} have different values; the "
        "head is used. Set tie_word_embeddings=false",
        stacklevel=3,
    )
    return dataclasses.replace(config, tie_word_embeddings=False)


def warn_of_rounding(model_dir: str | Path, config: ModelConfig, dtype: Any) -> None:
    """Warns once if a quantised checkpoint is served in other numbers than its own."""
    form, notes = format_of(model_dir), []
    if form is not None and (not form.is_kept or config.weights != form.weights):
        notes.append(f"its kernels are dequantised and rounded again to weights={config.weights!r}")
    if form is not None and form.activations:
        notes.append(f"it quantises activations ({form.activations}), which here keep {model_dtype(dtype).name}")
    if form is not None:
        with _open(Path(model_dir)) as tensors:
            assert isinstance(tensors, QuantisedTensors)
            shapes = traverse_util.flatten_dict(abstract_decoder(config, model_dtype(dtype))[1])
            kernels = {name for name, one in tensor_placements(config).items() if scale_path(one.path) in shapes}
            if plain := sorted(kernels.intersection(tensors.unquantised)):
                notes.append(f"{len(plain)} of its kernels are not quantised, and are rounded too, e.g. {plain[0]}")
    if form is not None and notes:
        method = f"config.json: quantization_config.quant_method={form.method!r}"
        warnings.warn(f"{model_dir}: {method}: {'; '.join(notes)}", stacklevel=3)


def _are_equal(one: Tensor, other: Tensor, dtype: np.dtype) -> bool:
    """Returns whether two tensors have the same values in `dtype`; reads them in blocks of rows."""
    if one.shape != other.shape:
        return False
    step = max(1, int(_BLOCK_BYTES / (one.element_bytes * math.prod(one.shape[1:]))))
    whole = tuple(slice(0, size) for size in one.shape[1:])
    blocks = (slice(start, min(start + step, one.shape[0])) for start in range(0, one.shape[0], step))
    return all(np.array_equal(one[rows, *whole].astype(dtype), other[rows, *whole].astype(dtype)) for rows in blocks)


def load_weights(
    model_dir: str | Path,
    config: ModelConfig,
    dtype: Any,
    progress: bool = True,
    parallel: TensorParallel | None = None,
) -> Params:
    """Reads the checkpoint into the decoder's parameter tree on `load_device()`.

    Args:
      dtype: "float32" or "bfloat16"; norm scales are float32 in both.
      progress: shows bytes read, on stderr.
      parallel: reads each device's part onto that device instead, sharded by `parallel.mesh.parameter_spec`.

    Raises:
      CheckpointError: a tensor is missing, unexpected or misshapen, or a file is damaged (checked before any weight is
        read), or a tensor has NaN or infinity.
    """
    files = _sources(model_dir)
    builders = _builders(config, dtype, parallel)
    total_bytes = _check_headers(files, tensor_placements(config), [b.placements for b in builders], config)
    with tqdm(total=total_bytes, unit="B", unit_scale=True, desc="Loading weights", disable=not progress) as bar:
        for file in files:
            with _open(file) as tensors:
                for name in tensors.names():
                    for builder in builders:
                        if name in builder.placements:
                            try:
                                for block_bytes in builder.read(tensors.get(name), builder.placements[name]):
                                    bar.update(block_bytes)
                            except FloatingPointError as error:
                                shown = tensors.name_in_file(name)
                                raise CheckpointError(f"{file}: tensor {shown}: {error}") from None
    if parallel is None:
        return traverse_util.unflatten_dict(builders[0].arrays)
    joined = {}
    for path, leaf in builders[0].arrays.items():
        spec = parameter_spec(path)
        shape = whole_shape(leaf.shape, spec, parallel.shards)
        parts = [builder.arrays[path] for builder in builders]
        joined[path] = jax.make_array_from_single_device_arrays(shape, parallel.sharding(spec), parts)
    return traverse_util.unflatten_dict(joined)


def load_device() -> jax.Device:
    """The device for parameters: `jax.default_device` if set, else this process's first device."""
    default = jax.config.jax_default_device
    return default if isinstance(default, jax.Device) else jax.local_devices(backend=default)[0]


class _ParamBuilder:
    """Fills one shard's fused parameters on the host and uploads each when its last part is complete."""

    def __init__(self, config: ModelConfig, dtype: Any, placements: dict[str, Placement], device: jax.Device):
        self.placements = placements
        self._device = device
        self._weights = config.weights
        self._shapes = traverse_util.flatten_dict(abstract_decoder(config, model_dtype(dtype))[1])
        self._missing_parts = dict.fromkeys(self._shapes, 0)
        self._elements = dict.fromkeys(self._shapes, 0)
        for placement in placements.values():
            self._missing_parts[placement.path] += 1
            self._elements[placement.path] += placement.size
        self._buffers: dict[ParamPath, np.ndarray] = {}
        self._arrays: dict[ParamPath, jax.Array] = {}

    @property
    def arrays(self) -> dict[ParamPath, jax.Array]:
        return {path: self._arrays[path] for path in self._shapes}

    def read(self, tensor: Tensor, placement: Placement) -> Iterator[float]:
        """Casts and copies a tensor's part into its parameter block by block; yields the bytes of each block.

        Raises `FloatingPointError` for NaN or infinity.
        """
        columns = placement.columns
        row_bytes = tensor.element_bytes * math.prod(axis.stop - axis.start for axis in columns)
        step = max(1, int(_BLOCK_BYTES / row_bytes))
        buffer = self._buffer(placement.path)
        target, first = placement.target(buffer).view(f"u{buffer.itemsize}"), 0  # [rows, d_in] or [rows]
        if placement.transposed and (scale := scale_path(placement.path)) in self._shapes:
            yield from self._quantise(tensor, placement, target, placement.target(self._buffer(scale)))
            self._part_done(placement.path)
            return
        for rows in placement.rows:
            for start in range(rows.start, rows.stop, step):
                block = tensor[(slice(start, min(start + step, rows.stop)), *columns)]  # [step, d_in] or [step]
                with np.errstate(over="ignore"):  # reported below
                    block = block.astype(buffer.dtype, copy=False)
                if placement.offset:
                    block = block + block.dtype.type(placement.offset)
                block = block.view(target.dtype)  # integers copy faster than ml_dtypes elements
                if _has_nonfinite(block):
                    raise FloatingPointError(f"expected finite values of {buffer.dtype.name}, found NaN or infinity")
                target[first : first + len(block)] = block
                first += len(block)
                yield len(block) * row_bytes
        self._part_done(placement.path)

    def _quantise(self, tensor: Tensor, placement: Placement, codes: np.ndarray, scale: np.ndarray) -> Iterator[float]:
        """Rounds a tensor's part into `codes` `[rows, ...]` and `scale` `[rows, groups]`, as `read`."""
        assert self._weights is not None and placement.inputs is not None
        (d_in,), part = tensor.shape[1:], placement.inputs
        # A scale of all inputs needs all inputs; groups do not cross the part's ends.
        columns = part if self._weights == "int4" else slice(0, d_in)
        row_bytes = tensor.element_bytes * (columns.stop - columns.start)
        step, first = max(1, int(_BLOCK_BYTES / row_bytes)), 0
        for rows in placement.rows:
            for start in range(rows.start, rows.stop, step):
                block = slice(start, min(start + step, rows.stop))
                kept = tensor.quantised(block, part, self._weights) if isinstance(tensor, QuantisedSlice) else None
                if kept is None:
                    values = np.ascontiguousarray(tensor[block, columns], np.float32)
                    if _has_nonfinite(values.view("u4")):
                        raise FloatingPointError("expected finite values, found NaN or infinity")
                    wide, block_scale = quantise(values, self._weights)
                    block_codes = wide if columns == part else wide[:, part]
                else:
                    block_codes, block_scale = kept
                if not np.isfinite(block_scale).all():
                    raise FloatingPointError("expected finite scales, found NaN or infinity")
                size = len(block_codes)
                codes[first : first + size] = block_codes.view(codes.dtype)
                scale[first : first + size] = block_scale
                first += size
                yield size * tensor.element_bytes * (part.stop - part.start)

    def _buffer(self, path: ParamPath) -> np.ndarray:
        if path not in self._buffers:
            shape = self._shapes[path].shape
            self._buffers[path] = _aligned_empty(shape, self._shapes[path].dtype)
            if self._elements[path] < math.prod(shape):  # shards pad the vocabulary; only one has the bias
                self._buffers[path][...] = 0
        return self._buffers[path]

    def _part_done(self, path: ParamPath) -> None:
        self._missing_parts[path] -= 1
        if not self._missing_parts[path]:
            for own in self._buffers.keys() & {path, scale_path(path)}:
                # Blocking limits host memory to one finished buffer beside its device copy.
                self._arrays[own] = jax.device_put(self._buffers.pop(own), self._device).block_until_ready()


def _builders(config: ModelConfig, dtype: Any, parallel: TensorParallel | None) -> list[_ParamBuilder]:
    """One builder for each shard on a device of this process."""
    if parallel is None:
        return [_ParamBuilder(config, dtype, tensor_placements(config), load_device())]
    return [
        _ParamBuilder(
            parallel.shards.of_model(config), dtype, tensor_placements(config, parallel.shards, shard), device
        )
        for shard, device in enumerate(parallel.devices)
        if device.process_index == jax.process_index()
    ]


def _has_nonfinite(bits: np.ndarray) -> bool:
    """Returns whether float32 (as uint32) or bfloat16 (as uint16) numbers include NaN or infinity, which have all
    exponent bits set."""
    exponent = bits.dtype.type(0x7F800000 if bits.itemsize == 4 else 0x7F80)
    return bool(bits.size) and bool((bits & exponent).max() == exponent)


def _aligned_empty(shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    nbytes = int(np.prod(shape)) * dtype.itemsize
    raw = np.empty(nbytes + _ALIGNMENT, np.uint8)
    start = -raw.ctypes.data % _ALIGNMENT
    return raw[start : start + nbytes].view(dtype).reshape(shape)


def _check_headers(
    files: list[Path], placements: dict[str, Placement], shards: list[dict[str, Placement]], config: ModelConfig
) -> float:
    """Checks names, shapes and dtypes of all files against the config; returns the bytes that `shards` will read."""
    found: dict[str, Path] = {}
    total_bytes, differs = 0.0, False
    for file in files:
        with _open(file) as tensors:
            for name in tensors.names():
                shown = tensors.name_in_file(name)
                if name not in placements:
                    if name == HEAD and config.tie_word_embeddings:
                        continue  # equal to the embeddings: `untied_if_heads_differ`
                    if FAMILIES[config.family].text_config and not name.startswith("model.layers."):
                        continue  # of images
                    if _ROTARY_BUFFER.fullmatch(name):
                        differs |= not _are_frequencies(tensors.get(name), config)
                        continue
                    raise CheckpointError(
                        f"{file}: unexpected tensor {shown}: not part of the model that the config describes"
                    )
                if name in found:
                    raise CheckpointError(f"{file}: tensor {name} is in {found[name].name} too")
                found[name] = file
                tensor, expected = tensors.get(name), placements[name].shape
                if tensor.shape != expected:
                    raise CheckpointError(f"{file}: tensor {shown}: expected shape {expected}, found {tensor.shape}")
                total_bytes += sum(own[name].size for own in shards) * tensor.element_bytes
            names_in_file = {name: tensors.name_in_file(name) for name in placements.keys() - found.keys()}
    if differs:
        warnings.warn(
            f"{files[0].parent}: rotary_emb.inv_freq in the checkpoint differs from the frequencies that config.json "
            "describes, which are used",
            stacklevel=4,
        )
    if missing := sorted(names_in_file.values()):
        shown = ", ".join(missing[:5]) + (f" and {len(missing) - 5} more" if len(missing) > 5 else "")
        raise CheckpointError(f"{files[0].parent}: missing tensors in {', '.join(f.name for f in files)}: {shown}")
    return total_bytes


def _are_frequencies(tensor: Tensor, config: ModelConfig) -> bool:
    """Returns whether a rotary buffer agrees with the config, up to half-precision rounding."""
    expected = inverse_frequencies(config.rope, config.head_dim, config.max_position_embeddings)
    if tensor.shape != expected.shape:
        return False
    found = tensor[(slice(0, len(expected)),)].astype(np.float32)
    return np.allclose(found, expected, rtol=1e-2, atol=1e-6)


def _sources(model_dir: str | Path) -> list[Path]:
    """The arguments of `_open` for a checkpoint: its weight files, or the directory of a quantised one, in which the
    parts of one kernel can be in several files."""
    files = checkpoint_files(model_dir)
    return [Path(model_dir)] if format_of(model_dir) is not None else files


def format_of(model_dir: str | Path) -> CheckpointFormat | None:
    """How the kernels of a Hugging Face directory are quantised; None: they are not. Raises as `checkpoint_format`."""
    file = Path(model_dir) / "config.json"
    return None if gguf_file(model_dir) or not file.exists() else checkpoint_format(read_json(file))


def _open(source: Path) -> AbstractContextManager[SafetensorsTensors | GgufTensors | QuantisedTensors]:
    """Memory-maps one of `_sources` within a `with` block; reports damage as `CheckpointError`."""
    if source.is_dir():
        form = format_of(source)
        assert form is not None
        return open_quantised(source, checkpoint_files(source), form)
    return _open_file(source)


def _open_file(file: Path) -> AbstractContextManager[SafetensorsTensors | GgufTensors]:
    return open_gguf(file) if file.suffix.lower() == ".gguf" else open_safetensors(file)
