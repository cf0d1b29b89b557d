"""Reads and writes PEFT adapter directories (adapter_config.json, adapter_model.safetensors) without torch."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file

from slora_jax.adapters.adapter import LoraAdapter, extended
from slora_jax.adapters.config import LoraConfig
from slora_jax.adapters.ends import KINDS, EndsReader, Vocabulary
from slora_jax.adapters.experts import ExpertsReader, is_of_experts
from slora_jax.adapters.geometry import BaseGeometry, module_name
from slora_jax.adapters.targets import Target, resolve_ends, resolve_targets
from slora_jax.adapters.tensor_names import PREFIX, TensorName, by_module, modules_of, nearest, parse
from slora_jax.adapters.untrusted.quoting import clipped, quoted
from slora_jax.adapters.untrusted.tensor_file import DTYPES, TensorFile
from slora_jax.errors import AdapterError
from slora_jax.models.projections import PROJECTIONS

CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"
PICKLE_FILE = "adapter_model.bin"
ADAPTER_FILES = (CONFIG_FILE, WEIGHTS_FILE, PICKLE_FILE)

_MAX_ENTRIES = 1000  # of a folder, searched for nested adapters
_UNSUPPORTED = {
    "lora_magnitude_vector": "a DoRA magnitude",
    "lora_embedding_A": "LoRA on an embedding",
    "lora_embedding_B": "LoRA on an embedding",
    "lora_B.bias": "a bias",
    "bias": "a bias",
    "trainable_tokens_delta": "trained token embeddings",
    "weight": "a fully trained module",
}

_FIELDS = {"lora_magnitude_vector": "use_dora", "lora_B.bias": "lora_bias", "bias": "bias"}
"""Kinds of tensors with one vector for a module, and the field that switches them on."""

Key = tuple[int, str]


def read_peft(
    directory: str | Path,
    geometry: BaseGeometry,
    check_ranks: Callable[[np.ndarray], object] | None = None,
    base: Vocabulary | None = None,
) -> LoraAdapter:
    """Reads an adapter that PEFT saved for a base model of this geometry; converts weights to float32.

    Args:
      check_ranks: called with `LoraAdapter.layout_ranks` before any weight is read; may raise to refuse the adapter.
      base: embedding and head of the base model, which an adapter that changes them needs.

    Raises:
      AdapterError: the adapter is refused; the message names file, tensor, expected and found value. Shapes and element
        types are checked in the file's header, before any weight is read. Files that change during the read are
        refused, because one adapter's config could be combined with another's weights.
    """
    directory = Path(directory)
    before = _versions(directory)
    adapter = _read_peft(directory, geometry, check_ranks, base)
    if _versions(directory) != before:
        raise AdapterError(f"{directory}: its files changed while they were read; load it again when they are complete")
    return adapter


def _read_peft(
    directory: Path,
    geometry: BaseGeometry,
    check_ranks: Callable[[np.ndarray], object] | None,
    base: Vocabulary | None,
) -> LoraAdapter:
    config = LoraConfig.from_file(directory / CONFIG_FILE)
    path = directory / WEIGHTS_FILE
    if not path.exists() and (directory / PICKLE_FILE).exists():
        raise AdapterError(
            f"{directory / PICKLE_FILE}: pickled weights are not read because unpickling can run arbitrary code; "
            f"save the adapter as {WEIGHTS_FILE} (PEFT: safe_serialization=True)"
        )
    with TensorFile(path) as file:
        names = {name: parse(name) for name in file.entries}
        parents = {found.parent: name for name, found in names.items() if found is not None and found.layer is not None}
        parent, modules = next(iter(parents), "model"), modules_of(names.values())
        projections = by_module(modules)
        try:
            end_targets = resolve_ends(config, parent)
            outside = {
                name: found
                for name, found in names.items()
                if found is not None and found.layer is None and _is_read(found, config, end_targets)
            }
            of_experts = {
                name: found
                for name, found in names.items()
                if found is not None and is_of_experts(found) and any(geometry.expert_layers)
            }
            experts = ExpertsReader(file, of_experts, config, geometry, parent)
            others = [*end_targets, *outside, *(["experts"] if experts else [])]
            targets = resolve_targets(config, geometry.num_layers, parent, modules, others, geometry.expert_layers)
        except AdapterError as error:
            raise AdapterError(f"{directory / CONFIG_FILE}: {error}") from None
        inside = {name: found for name, found in names.items() if name not in outside and name not in of_experts}
        places = _tensor_names(path, inside, targets, projections, config, geometry)
        tensors = _Tensors(file, modules, projections, places)
        reader = EndsReader(file, outside, end_targets, config, geometry.hidden_size, geometry.vocab_size)
        if len(parents) > 1:
            raise AdapterError(
                f"{path}: tensors {' and '.join(map(quoted, parents.values()))} have their layers in different modules "
                f"({' and '.join(parents)}); expected one for all"
            )
        for key, target in targets.items():
            tensors.check(key, target, geometry, parent, config)
        biases = [(layer, p) for layer, module, kind in tensors.names if kind == "bias" for p in projections[module]]
        for key in biases:
            tensors.check_vector(key, "bias", geometry)
        end_ranks, expert_ranks = reader.check(), experts.check() if experts or of_experts else None
        if check_ranks is not None:
            ranks, vectors = _ranks(targets, geometry.num_layers), config.use_dora or config.lora_bias or bool(biases)
            is_plain = not vectors and not any(end_ranks.values()) and expert_ranks is None
            check_ranks(ranks if is_plain else extended(ranks, vectors, end_ranks, expert_ranks))
        if end_ranks and base is None:
            raise AdapterError(f"{path}: {' and '.join(end_ranks)}: needs the weights of the base model")
        a = {key: tensors.read_a(key) for key in targets}
        b = {key: tensors.read_rows(key, "lora_B", geometry) for key in targets}
        adapter = adapter_of(config, targets, a, b, geometry.num_layers)
        return replace(
            adapter,
            magnitudes={k: tensors.read_rows(k, "lora_magnitude_vector", geometry) for k in targets if config.use_dora},
            lora_biases={k: tensors.read_rows(k, "lora_B.bias", geometry) for k in targets if config.lora_bias},
            base_biases={k: tensors.read_rows(k, "bias", geometry) for k in biases},
            ends={} if base is None else reader.read(base),
            experts=experts.read(),
            expert_ranks=expert_ranks,
        )


def _is_read(found: TensorName, config: LoraConfig, targets: Mapping[str, Target]) -> bool:
    """Returns whether a tensor outside the layers is one that the config asks for, or a matrix saved whole."""
    if found.kind not in KINDS.get(found.module, ()):
        return False
    if found.kind == "weight":
        return True
    return found.module in (config.tokens if found.kind == "trainable_tokens_delta" else targets)


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
    if adapter.ends or adapter.experts:
        parts = [*adapter.ends, *(["experts"] if adapter.experts else [])]
        raise AdapterError(f"{' and '.join(parts)}: LoRA outside the projections of layers is read, but not written")
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
    for kind, field in _FIELDS.items():
        for key, vector in adapter.vectors.get(field, {}).items():
            tensors[f"{PREFIX}{module_name(*key)}.{kind}"] = np.ascontiguousarray(vector, np.dtype(dtype))
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
    path: Path,
    names: Mapping[str, TensorName | None],
    targets: Mapping[Key, Target],
    projections: Mapping[str, tuple[str, ...]],
    config: LoraConfig,
    geometry: BaseGeometry,
) -> dict[tuple[int, str, str], str]:
    """`(layer, module, kind) -> tensor name`. Raises AdapterError for an unexpected or duplicate tensor."""
    places: dict[tuple[int, str, str], str] = {}
    unexpected: dict[str, str] = {}  # tensor name -> reason
    kinds = ("lora_A", "lora_B", *(kind for kind, field in _FIELDS.items() if field in config.extras))
    everywhere = ("bias",) if config.bias == "all" else ()
    for name, found in names.items():
        if found is None or found.layer is None or found.module not in projections:
            unexpected[name] = _unknown(name, found)
        elif found.kind not in kinds:
            reason = f"only LoRA on {', '.join(PROJECTIONS)} is read"
            if found.kind in _FIELDS:
                reason = f"{CONFIG_FILE} does not set {_FIELDS[found.kind]}"
            unexpected[name] = f"{_UNSUPPORTED[found.kind]}; {reason}"
        elif found.layer >= geometry.num_layers:
            layers = f"the base model has {geometry.num_layers} layers"
            unexpected[name] = f"{layers}; the adapter was probably trained on another base model"
        elif (found.layer, projections[found.module][0]) not in targets and found.kind not in everywhere:
            unexpected[name] = f"{CONFIG_FILE} does not target this module"
        elif (other := places.setdefault((found.layer, found.module, found.kind), name)) != name:
            raise AdapterError(f"{path}: tensors {quoted(other)} and {quoted(name)} are the same weight twice")
    if unexpected:
        first, *others = unexpected
        shown = ", ".join([*map(quoted, others[:2]), *(["..."] if len(others) > 2 else [])])
        more = f" (and {len(others)} more: {shown})" if others else ""
        near = filter(None, (nearest(name, names[name], projections) for name in [first, *others[:2]]))
        known = ", ".join(map(quoted, dict.fromkeys(near)))
        raise AdapterError(
            f"{path}: unexpected tensor {quoted(first)}{more}: {unexpected[first]}"
            + (f"; nearest known names: {known}" if known else "")
        )
    return places


def _unknown(name: str, found: TensorName | None) -> str:
    """The reason for refusing a tensor of no module with LoRA."""
    if found is None:
        reason = "no known LoRA weight"
        prefix, layers, _ = name.partition("layers.")
        if parse(f"{prefix}{layers}0.self_attn.q_proj.lora_A.weight") is None:
            reason += f" (expected the prefix '{PREFIX}model.layers.', found {quoted(prefix)})"
    else:
        if found.module in KINDS and found.kind in KINDS[found.module]:
            return f"{CONFIG_FILE} does not target this module"
        if found.module in ("mlp.gate", "block_sparse_moe.gate"):
            return "LoRA on the router of experts is not supported"
        reason = "no known LoRA weight" if found.kind in ("lora_A", "lora_B") else _UNSUPPORTED[found.kind]
    return f"{reason}; only LoRA on {', '.join(PROJECTIONS)} is read"


@dataclass(frozen=True)
class _Tensors:
    """An open safetensors file, each projection's module, each module's projections, and the tensor names by layer,
    module and kind."""

    file: TensorFile
    modules: Mapping[str, str]
    projections: Mapping[str, tuple[str, ...]]
    names: Mapping[tuple[int, str, str], str]

    def check(self, key: Key, target: Target, geometry: BaseGeometry, parent: str, config: LoraConfig) -> None:
        """Raises AdapterError unless the module of this projection has A and B, and the vectors that the config asks
        for, of the right shape and dtype."""
        layer, module = key[0], self.modules[key[1]]
        vectors = [kind for kind, field in _FIELDS.items() if kind != "bias" and field in config.extras]
        for kind in ("lora_A", "lora_B", *vectors):
            if (layer, module, kind) not in self.names:
                missing = quoted(str(TensorName(parent, layer, module, kind)))
                raise AdapterError(f"{self.file.path}: missing tensor {missing}, which {CONFIG_FILE} targets")
        for kind in vectors:
            self.check_vector(key, kind, geometry)
        d_in, d_out = geometry.dims(key[1])[0], self._rows(key, geometry)[1]
        for kind, rank_axis, expected in (("lora_A", 0, [target.rank, d_in]), ("lora_B", 1, [d_out, target.rank])):
            name = self.names[layer, module, kind]
            shape = self._shape(name)
            if shape == expected:
                continue
            if len(shape) == 2 and shape[1 - rank_axis] == expected[1 - rank_axis]:
                reason = f"{CONFIG_FILE} says rank {target.rank}, the tensor has rank {shape[rank_axis]}"
            else:
                reason = "the adapter was probably trained on another base model"
            raise AdapterError(
                f"{self.file.path}: tensor {quoted(name)}: expected shape {expected}, found {shape}: {reason}"
            )

    def check_vector(self, key: Key, kind: str, geometry: BaseGeometry) -> None:
        """Raises AdapterError unless a vector of this projection's module has the right shape and dtype."""
        name, expected = self.names[key[0], self.modules[key[1]], kind], [self._rows(key, geometry)[1]]
        if (shape := self._shape(name)) != expected:
            raise AdapterError(
                f"{self.file.path}: tensor {quoted(name)}: expected shape {expected}, found {shape}: the adapter was "
                "probably trained on another base model"
            )

    def read_a(self, key: Key) -> np.ndarray:
        """A `[r, d_in]` of a projection; those of a fused module share it."""
        return self._read(self.names[key[0], self.modules[key[1]], "lora_A"])

    def read_rows(self, key: Key, kind: str, geometry: BaseGeometry) -> np.ndarray:
        """B `[d_out, r]` or a vector `[d_out]` of a projection, its own rows of a fused module's."""
        return self._read(self.names[key[0], self.modules[key[1]], kind])[self._rows(key, geometry)[0]]

    def _rows(self, key: Key, geometry: BaseGeometry) -> tuple[slice, int]:
        """A projection's rows of its module's output, and the number of all its rows."""
        module, first, own = self.modules[key[1]], 0, slice(0)
        for projection in self.projections[module]:
            d_out = geometry.dims(projection)[1]
            if projection == key[1]:
                own = slice(first, first + d_out)
            first += d_out
        return own, first

    def _shape(self, name: str) -> list[int]:
        """A tensor's shape. Raises AdapterError unless its dtype is read."""
        entry = self.file.entries[name]
        if entry.dtype not in DTYPES:
            raise AdapterError(
                f"{self.file.path}: tensor {quoted(name)}: expected {', '.join(DTYPES)}, found {clipped(entry.dtype)}"
            )
        return entry.shape

    def _read(self, name: str) -> np.ndarray:
        matrix = np.asarray(self.file.read(name), np.float32)
        if not np.isfinite(matrix).all():
            raise AdapterError(
                f"{self.file.path}: tensor {quoted(name)}: expected finite values, found NaN or infinity"
            )
        return matrix
