"""Weights from a Hugging Face directory: safetensors in, the decoder's fused `[in, out]` parameters out.

Every header is checked against the config before the first weight is read. Tensors are then read in blocks of rows and
written straight into their place in the fused parameter, which becomes a device array once its last part has arrived.
Host memory beyond the parameters themselves (on the CPU backend the buffers *are* the device arrays) is one block.
"""

import contextlib
import dataclasses
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax import traverse_util
from safetensors import SafetensorError, safe_open
from tqdm import tqdm

from slora_jax.errors import CheckpointError
from slora_jax.models.config import ModelConfig, read_json
from slora_jax.models.decoder import Params, model_dtype
from slora_jax.models.init import abstract_decoder

_BLOCK_BYTES = 1 << 20
_ALIGNMENT = 64  # bytes; the CPU backend adopts a buffer so aligned instead of copying it
_READABLE_DTYPES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2}  # bytes per element
_ROTARY_BUFFER = re.compile(r"model\.(layers\.\d+\.self_attn\.)?rotary_emb\.inv_freq")

ParamPath = tuple[str | int, ...]


@dataclasses.dataclass(frozen=True)
class Placement:
    """Where a checkpoint tensor goes: columns from `column` on of the parameter at `path`, transposed if a kernel.

    `shape` is the tensor's shape in the checkpoint.
    """

    path: ParamPath
    shape: tuple[int, ...]
    column: int = 0
    transposed: bool = False


def tensor_placements(config: ModelConfig) -> dict[str, Placement]:
    """Every tensor that a checkpoint of this config must hold, by its Hugging Face name."""
    d, ffn, q, kv = config.hidden_size, config.intermediate_size, config.q_width, config.kv_width
    placements = {
        "model.embed_tokens.weight": Placement(("embed", "embedding"), (config.vocab_size, d)),
        "model.norm.weight": Placement(("norm", "scale"), (d,)),
    }
    if not config.tie_word_embeddings:
        placements["lm_head.weight"] = Placement(("lm_head", "kernel"), (config.vocab_size, d), transposed=True)
    stacks = (
        ("qkv", "self_attn", (("q_proj", q), ("k_proj", kv), ("v_proj", kv)), d, config.qkv_bias),
        ("o", "self_attn", (("o_proj", d),), q, config.o_bias),
        ("gate_up", "mlp", (("gate_proj", ffn), ("up_proj", ffn)), d, config.mlp_bias),
        ("down", "mlp", (("down_proj", d),), ffn, config.mlp_bias),
    )
    norms = [("input_norm", "input_layernorm", d), ("post_attention_norm", "post_attention_layernorm", d)]
    if config.qk_norm:
        norms += [("q_norm", "self_attn.q_norm", config.head_dim), ("k_norm", "self_attn.k_norm", config.head_dim)]
    for index in range(config.num_layers):
        prefix, layer = f"model.layers.{index}", ("layers", index)
        for ours, theirs, features in norms:
            placements[f"{prefix}.{theirs}.weight"] = Placement((*layer, ours, "scale"), (features,))
        for stack, block, parts, d_in, bias in stacks:
            column = 0
            for part, d_out in parts:
                name = f"{prefix}.{block}.{part}"
                placements[f"{name}.weight"] = Placement((*layer, stack, "kernel"), (d_out, d_in), column, True)
                if bias:
                    placements[f"{name}.bias"] = Placement((*layer, stack, "bias"), (d_out,), column)
                column += d_out
    return placements


def checkpoint_files(model_dir: str | Path) -> list[Path]:
    """The safetensors files of a checkpoint: `model.safetensors`, or the shards its index names, in name order.

    Raises `CheckpointError` if there are none, if a shard is missing, or if only pickled weights are there.
    """
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
            f"{model_dir}: only pickled weights (*.bin) are there. They can run code when read, so they are refused; "
            "convert the checkpoint to safetensors (transformers: save_pretrained)"
        )
    raise CheckpointError(f"{model_dir}: neither {single.name} nor {index.name} is there")


def load_weights(model_dir: str | Path, config: ModelConfig, dtype: Any, progress: bool = True) -> Params:
    """Reads the checkpoint into the decoder's parameter tree on this process's first (or the default) device.

    dtype is "float32" or "bfloat16"; norm scales are float32 in both. `progress` shows bytes read, on stderr.

    Raises `CheckpointError` for missing, unexpected or misshapen tensors and damaged files, before reading weights.
    """
    placements = tensor_placements(config)
    files = checkpoint_files(model_dir)
    total_bytes = _check_headers(files, placements, config)
    builder = _ParamBuilder(config, dtype, placements)
    with tqdm(total=total_bytes, unit="B", unit_scale=True, desc="Loading weights", disable=not progress) as bar:
        for file in files:
            with _open(file) as tensors:
                for name in tensors.offset_keys():
                    if name in placements:
                        for block_bytes in _read_into(builder, tensors.get_slice(name), placements[name]):
                            bar.update(block_bytes)
                        builder.part_done(placements[name].path)
    return builder.params()


def load_device() -> jax.Device:
    """Where parameters are put: `jax.default_device` if one is set, else this process's first device."""
    default = jax.config.jax_default_device
    return default if isinstance(default, jax.Device) else jax.local_devices(backend=default)[0]


class _ParamBuilder:
    """Fused parameters being filled on the host, each moved to the device when its last part is in."""

    def __init__(self, config: ModelConfig, dtype: Any, placements: dict[str, Placement]):
        self._shapes = traverse_util.flatten_dict(abstract_decoder(config, model_dtype(dtype))[1])
        self._missing_parts = dict.fromkeys(self._shapes, 0)
        for placement in placements.values():
            self._missing_parts[placement.path] += 1
        self._buffers: dict[ParamPath, np.ndarray] = {}
        self._arrays: dict[ParamPath, jax.Array] = {}
        self._device = load_device()

    def buffer(self, path: ParamPath) -> np.ndarray:
        if path not in self._buffers:
            self._buffers[path] = _aligned_empty(self._shapes[path].shape, self._shapes[path].dtype)
        return self._buffers[path]

    def part_done(self, path: ParamPath) -> None:
        self._missing_parts[path] -= 1
        if not self._missing_parts[path]:
            # Waiting keeps at most one finished buffer beside its device copy.
            self._arrays[path] = jax.device_put(self._buffers.pop(path), self._device).block_until_ready()

    def params(self) -> Params:
        return traverse_util.unflatten_dict({path: self._arrays[path] for path in self._shapes})


def _read_into(builder: _ParamBuilder, tensor: Any, placement: Placement) -> Iterator[int]:
    """Copies one tensor into its parameter block by block, casting; yields the bytes of each block."""
    rows = placement.shape[0]
    row_bytes = _READABLE_DTYPES[tensor.get_dtype()] * int(np.prod(placement.shape[1:]))
    step = max(1, _BLOCK_BYTES // row_bytes)
    buffer = builder.buffer(placement.path)
    for start in range(0, rows, step):
        block = tensor[start : min(start + step, rows)]  # [step, d_in] or [step]
        columns = slice(placement.column + start, placement.column + start + len(block))
        target = buffer[:, columns].T if placement.transposed else buffer[columns]  # [step, d_in] or [step]
        if target.dtype == block.dtype:  # bytes move faster than ml_dtypes elements
            target, block = target.view(f"u{target.itemsize}"), block.view(f"u{block.itemsize}")
        target[...] = block
        yield len(block) * row_bytes


def _aligned_empty(shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    nbytes = int(np.prod(shape)) * dtype.itemsize
    raw = np.empty(nbytes + _ALIGNMENT, np.uint8)
    start = -raw.ctypes.data % _ALIGNMENT
    return raw[start : start + nbytes].view(dtype).reshape(shape)


def _check_headers(files: list[Path], placements: dict[str, Placement], config: ModelConfig) -> int:
    """Checks names, shapes and dtypes of all files against the config; returns the bytes to be read."""
    found: dict[str, Path] = {}
    total_bytes = 0
    for file in files:
        with _open(file) as tensors:
            for name in tensors.offset_keys():
                if name not in placements:
                    if _ROTARY_BUFFER.fullmatch(name) or (name == "lm_head.weight" and config.tie_word_embeddings):
                        continue
                    raise CheckpointError(f"{file}: unexpected tensor {name}: config.json describes no such part")
                if name in found:
                    raise CheckpointError(f"{file}: tensor {name} is in {found[name].name} too")
                found[name] = file
                tensor, expected = tensors.get_slice(name), placements[name].shape
                shape, dtype = tuple(tensor.get_shape()), tensor.get_dtype()
                if shape != expected:
                    raise CheckpointError(f"{file}: tensor {name}: expected shape {expected}, found {shape}")
                if dtype not in _READABLE_DTYPES:
                    raise CheckpointError(
                        f"{file}: tensor {name}: dtype {dtype} is not supported; supported: {sorted(_READABLE_DTYPES)}"
                    )
                total_bytes += int(np.prod(shape)) * _READABLE_DTYPES[dtype]
    if missing := sorted(placements.keys() - found.keys()):
        shown = ", ".join(missing[:5]) + (f" and {len(missing) - 5} more" if len(missing) > 5 else "")
        raise CheckpointError(f"{files[0].parent}: missing tensors in {', '.join(f.name for f in files)}: {shown}")
    return total_bytes


@contextlib.contextmanager
def _open(file: Path) -> Iterator[Any]:
    """Memory-maps a safetensors file for the time of the block; damage is reported as `CheckpointError`."""
    try:
        with safe_open(file, framework="numpy") as tensors:
            yield tensors
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{file}: cannot be read as safetensors: {error}") from error
