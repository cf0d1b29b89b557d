"""Reads and writes PEFT adapter directories (adapter_config.json, adapter_model.safetensors) without torch."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import NamedTuple

import numpy as np
from safetensors.numpy import save_file

from slora_jax.adapters.adapter import LoraAdapter
from slora_jax.adapters.config import LoraConfig
from slora_jax.adapters.geometry import BaseGeometry, module_name
from slora_jax.adapters.targets import Target, resolve_targets
from slora_jax.adapters.untrusted.quoting import clipped, quoted
from slora_jax.adapters.untrusted.tensor_file import DTYPES, TensorFile
from slora_jax.errors import AdapterError
from slora_jax.models.projections import PROJECTIONS

CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"
PICKLE_FILE = "adapter_model.bin"
ADAPTER_FILES = (CONFIG_FILE, WEIGHTS_FILE, PICKLE_FILE)
PREFIX = "base_model.model."

_WRAPPERS = {"_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module", "module"}
"""Parts of a name that torch.compile, FSDP, activation checkpointing and DDP add."""
_LAYERS = (
    r"(base_model\.model\.)?"
    r"((?P<parent>model|language_model|model\.language_model|language_model\.model)\.)?layers\."
)
_WEIGHT = re.compile(
    _LAYERS + r"(?P<layer>0|[1-9]\d{0,5})\.(?P<module>[a-z_]+\.[a-z_]+)"
    r"\.lora_(?P<side>[AB])(\.(?P<adapter>[^.]+))?\.weight"
)
_MAX_ENTRIES = 1000  # of a folder, searched for nested adapters
_PROJECTION_OF = {p.module: name for name, p in PROJECTIONS.items()}
_UNSUPPORTED_PARTS = {
    "lora_magnitude_vector": "a DoRA magnitude",
    "lora_embedding": "LoRA on an embedding",
    "embed_tokens": "an embedding",
    "lm_head": "the output head",
    "modules_to_save": "a fully trained module",
    "token_adapter": "trained token embeddings",
    ".bias": "a bias",
}

Key = tuple[int, str]


class WeightName(NamedTuple):
    """A parsed tensor name.

    Attributes:
      parent: the module that contains the decoder's layers.
      key: layer and projection.
      side: "A" or "B".
    """

    parent: str
    key: Key
    side: str


def weight_name(name: str) -> WeightName | None:
    """Parses a tensor's name; None unless it names a LoRA weight of one of the projections. Wrappers' parts are
    skipped, PEFT's prefix is optional, and the layers may belong to the language model of a multimodal model."""
    match = _WEIGHT.fullmatch(_unwrapped(name))
    projection = _PROJECTION_OF.get(match["module"]) if match else None
    if match is None or projection is None:
        return None
    return WeightName(match["parent"] or "model", (int(match["layer"]), projection), match["side"])


def _unwrapped(name: str) -> str:
    return ".".join(part for part in name.split(".") if part not in _WRAPPERS)


def read_peft(
    directory: str | Path, geometry: BaseGeometry, check_ranks: Callable[[np.ndarray], object] | None = None
) -> LoraAdapter:
    """Reads an adapter that PEFT saved for a base model of this geometry; converts weights to float32.

    Args:
      check_ranks: called with the ranks `[num_layers, 7]` before any weight is read; may raise to refuse the adapter.

    Raises:
      AdapterError: the adapter is refused; the message names file, tensor, expected and found value. Shapes and element
        types are checked in the file's header, before any weight is read. Files that change during the read are
        refused, because one adapter's config could be combined with another's weights.
    """
    directory = Path(directory)
    before = _versions(directory)
    adapter = _read_peft(directory, geometry, check_ranks)
    if _versions(directory) != before:
        raise AdapterError(f"{directory}: its files changed while they were read; load it again when they are complete")
    return adapter


def _read_peft(
    directory: Path, geometry: BaseGeometry, check_ranks: Callable[[np.ndarray], object] | None
) -> LoraAdapter:
    config = LoraConfig.from_file(directory / CONFIG_FILE)
    path = directory / WEIGHTS_FILE
    if not path.exists() and (directory / PICKLE_FILE).exists():
        raise AdapterError(
            f"{directory / PICKLE_FILE}: pickled weights are not read because unpickling can run arbitrary code; "
            f"save the adapter as {WEIGHTS_FILE} (PEFT: safe_serialization=True)"
        )
    with TensorFile(path) as file:
        names = {name: weight_name(name) for name in file.entries}
        parents = {found.parent: name for name, found in names.items() if found is not None}
        try:
            targets = resolve_targets(config, geometry.num_layers, next(iter(parents), "model"))
        except AdapterError as error:
            raise AdapterError(f"{directory / CONFIG_FILE}: {error}") from None
        tensors = _Tensors(file, _tensor_names(path, names, targets, geometry))
        if len(parents) > 1:
            raise AdapterError(
                f"{path}: tensors {' and '.join(map(quoted, parents.values()))} have their layers in different modules "
                f"({' and '.join(parents)}); expected one for all"
            )
        tensors.check_complete(targets)
        for key, target in targets.items():
            tensors.check_shapes(key, target, geometry)
        if check_ranks is not None:
            check_ranks(_ranks(targets, geometry.num_layers))
        a = {key: tensors.read(key, "A") for key in targets}
        b = {key: tensors.read(key, "B") for key in targets}
    return adapter_of(config, targets, a, b, geometry.num_layers)


def is_adapter(directory: Path) -> bool:
    """Returns whether a folder contains any adapter file; it is then loaded as an adapter or refused."""
    return any(os.path.exists(directory / file) for file in ADAPTER_FILES)


def misplaced(root: Path) -> dict[str, str]:
    """Explains, by folder, why a search of `root` misses adapters: `root` is an adapter itself, or a folder in it
    contains adapters or cannot be read. Hidden folders are skipped."""
    reasons = {}
    if is_adapter(root):
        reasons[root.resolve().name] = f"{root} is an adapter itself; pass its parent directory"
    for folder in sorted(root.iterdir()):
        if folder.name.startswith(".") or is_adapter(folder) or not folder.is_dir():
            continue
        try:
            inner = next((one.name for one in islice(folder.iterdir(), _MAX_ENTRIES) if is_adapter(one)), None)
        except OSError as error:
            reasons[folder.name] = f"{folder} cannot be read: {error.strerror}"
        else:
            if inner is not None:
                reasons[folder.name] = f"{folder} holds adapters ({inner!r}) but is not one itself; pass this directory"
    return reasons


def adapter_of(
    config: LoraConfig,
    targets: Mapping[Key, Target],
    a: Mapping[Key, np.ndarray],
    b: Mapping[Key, np.ndarray],
    num_layers: int,
) -> LoraAdapter:
    """Joins a config's resolved targets with their matrices (`a [r, d_in]`, `b [d_out, r]`)."""
    scales = {key: target.scale for key, target in targets.items()}
    return LoraAdapter(config=config, a=a, b=b, scales=scales, ranks=_ranks(targets, num_layers))


def write_peft(
    directory: str | Path,
    adapter: LoraAdapter,
    dtype: str = "float32",
    base_model_name_or_path: str | None = None,
) -> Path:
    """Writes an adapter directory that PEFT can load, and returns it.

    Args:
      dtype: element type of the weights: float32, float16 or bfloat16.
      base_model_name_or_path: name to write; None: the value in `adapter.config`.

    Raises:
      AdapterError: `dtype` is not supported, or `adapter.config` does not resolve to the matrices' ranks and scales.
    """
    if dtype not in DTYPES.values():
        raise AdapterError(f"dtype: expected one of {', '.join(DTYPES.values())}, found {dtype!r}")
    targets = resolve_targets(adapter.config, len(adapter.ranks))
    found = {key: Target(matrix.shape[0], adapter.scales[key]) for key, matrix in adapter.a.items()}
    if targets != found:
        wrong = next(key for key in sorted(targets.keys() | found.keys()) if targets.get(key) != found.get(key))
        raise AdapterError(
            f"{module_name(*wrong)}: the config says {targets.get(wrong)}, the weights say {found.get(wrong)}"
        )
    tensors = {}
    for key in targets:
        for side, matrix in (("A", adapter.a[key]), ("B", adapter.b[key])):
            tensors[f"{PREFIX}{module_name(*key)}.lora_{side}.weight"] = np.ascontiguousarray(matrix, np.dtype(dtype))
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    base = base_model_name_or_path or adapter.config.base_model_name_or_path
    config = adapter.config.to_json() | {"base_model_name_or_path": base}
    (directory / CONFIG_FILE).write_text(json.dumps(config, indent=2) + "\n")
    save_file(tensors, directory / WEIGHTS_FILE, metadata={"format": "pt"})
    return directory


def _ranks(targets: Mapping[Key, Target], num_layers: int) -> np.ndarray:
    ranks = np.zeros((num_layers, len(PROJECTIONS)), np.int32)  # [num_layers, 7]
    for (layer, projection), target in targets.items():
        ranks[layer, [*PROJECTIONS].index(projection)] = target.rank
    return ranks


def _versions(directory: Path) -> list[tuple[int, int] | None]:
    """Size and modification time of each adapter file, to detect writes by other processes."""
    versions: list[tuple[int, int] | None] = []
    for file in (CONFIG_FILE, WEIGHTS_FILE):
        try:
            stat = os.stat(directory / file)
            versions.append((stat.st_size, stat.st_mtime_ns))
        except OSError:
            versions.append(None)
    return versions


def _tensor_names(
    path: Path, names: Mapping[str, WeightName | None], targets: Mapping[Key, Target], geometry: BaseGeometry
) -> dict[tuple[Key, str], str]:
    """`((layer, projection), "A" | "B") -> tensor name`. Raises AdapterError for an unexpected or duplicate tensor."""
    places: dict[tuple[Key, str], str] = {}
    unexpected: dict[str, str] = {}  # tensor name -> reason
    for name, found in names.items():
        if found is None:
            unexpected[name] = _unknown(name)
        elif found.key[0] >= geometry.num_layers:
            layers = f"the base model has {geometry.num_layers} layers"
            unexpected[name] = f"{layers}; the adapter was probably trained on another base model"
        elif found.key not in targets:
            unexpected[name] = f"{CONFIG_FILE} does not target this module"
        elif (other := places.setdefault((found.key, found.side), name)) != name:
            raise AdapterError(f"{path}: tensors {quoted(other)} and {quoted(name)} are the same weight twice")
    if unexpected:
        first, *others = unexpected
        shown = ", ".join([*map(quoted, others[:2]), *(["..."] if len(others) > 2 else [])])
        more = f" (and {len(others)} more: {shown})" if others else ""
        raise AdapterError(f"{path}: unexpected tensor {quoted(first)}{more}: {unexpected[first]}")
    return places


def _unknown(name: str) -> str:
    """The reason for refusing a tensor whose name `weight_name` cannot parse."""
    reason = next((kind for part, kind in _UNSUPPORTED_PARTS.items() if part in name), "no known LoRA weight")
    prefix, layers, _ = name.partition("layers.")
    if not re.fullmatch(_LAYERS, _unwrapped(prefix + layers)):
        reason += f" (expected the prefix '{PREFIX}model.layers.', found {quoted(prefix)})"
    return f"{reason}; only LoRA on {', '.join(PROJECTIONS)} is read"


@dataclass(frozen=True)
class _Tensors:
    """An open safetensors file and the names of its LoRA weights."""

    file: TensorFile
    names: Mapping[tuple[Key, str], str]

    def check_complete(self, targets: Mapping[Key, Target]) -> None:
        for key in targets:
            for side in "AB":
                if (key, side) not in self.names:
                    name = f"{PREFIX}{module_name(*key)}.lora_{side}.weight"
                    raise AdapterError(f"{self.file.path}: missing tensor {quoted(name)}, which {CONFIG_FILE} targets")

    def check_shapes(self, key: Key, target: Target, geometry: BaseGeometry) -> None:
        d_in, d_out = geometry.dims(key[1])
        for side, rank_axis, expected in (("A", 0, [target.rank, d_in]), ("B", 1, [d_out, target.rank])):
            name = self.names[key, side]
            shape, dtype = self.file.entries[name].shape, self.file.entries[name].dtype
            if dtype not in DTYPES:
                raise AdapterError(
                    f"{self.file.path}: tensor {quoted(name)}: expected {', '.join(DTYPES)}, found {clipped(dtype)}"
                )
            if shape == expected:
                continue
            if len(shape) == 2 and shape[1 - rank_axis] == expected[1 - rank_axis]:
                reason = f"{CONFIG_FILE} says rank {target.rank}, the tensor has rank {shape[rank_axis]}"
            else:
                reason = "the adapter was probably trained on another base model"
            raise AdapterError(
                f"{self.file.path}: tensor {quoted(name)}: expected shape {expected}, found {shape}: {reason}"
            )

    def read(self, key: Key, side: str) -> np.ndarray:
        name = self.names[key, side]
        matrix = np.asarray(self.file.read(name), np.float32)
        if not np.isfinite(matrix).all():
            raise AdapterError(
                f"{self.file.path}: tensor {quoted(name)}: expected finite values, found NaN or infinity"
            )
        return matrix
