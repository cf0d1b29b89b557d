"""Reads LoRA on experts in both of PEFT's layouts, as one A and one B for gate, up and down of each expert.

transformers 5 stacks a layer's experts in two parameters, `gate_up_proj` and `down_proj`. PEFT adapts a parameter
(`target_parameters`) with one A `[E r, d_in]`, expert after expert, and one B `[d_out, r E]`, rank after rank. The
wrapper of the second parameter contains that of the first, whose tensors are named `experts.base_layer`.
transformers 4 has a module for each projection of each expert, and so has the adapter.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from pallas_kernels.lora.layout import EXPERT_PROJECTIONS
from slora_jax.adapters.adapter import ExpertKey
from slora_jax.adapters.config import EXPERT_PARAMETERS, LoraConfig
from slora_jax.adapters.geometry import BaseGeometry
from slora_jax.adapters.targets import Target, resolve_modules, resolve_parameters
from slora_jax.adapters.tensor_names import TensorName
from slora_jax.adapters.untrusted.quoting import clipped, quoted
from slora_jax.adapters.untrusted.tensor_file import DTYPES, TensorFile
from slora_jax.errors import AdapterError

STACKED = ("mlp.experts", "mlp.experts.base_layer")
"""Modules of a layer's stacked parameters: the outer wrapper, and the inner one."""

SPELLINGS = (
    {"gate": "mlp.experts.{}.gate_proj", "up": "mlp.experts.{}.up_proj", "down": "mlp.experts.{}.down_proj"},
    {"gate": "block_sparse_moe.experts.{}.w1", "up": "block_sparse_moe.experts.{}.w3",
     "down": "block_sparse_moe.experts.{}.w2"},
)  # fmt: skip
"""Names of an expert's modules within a layer: in most families, and in Mixtral."""


@dataclass(frozen=True)
class _Source:
    """The module with the LoRA of some projections of one expert, or of all.

    Attributes:
      projections: in the order of B's rows.
      expert: None: all of the layer.
    """

    layer: int
    module: str
    projections: tuple[str, ...]
    expert: int | None
    target: Target


class ExpertsReader:
    """Reads the tensors of experts of one adapter file.

    Args:
      names: the tensors of experts, by name in the file.
      parent: name of the module that contains the layers.

    Raises:
      AdapterError: the config targets experts that the base model does not have, or a field does not apply to them.
    """

    def __init__(
        self, file: TensorFile, names: Mapping[str, TensorName], config: LoraConfig, geometry: BaseGeometry, parent: str
    ) -> None:
        self._file, self._geometry, self._parent = file, geometry, parent
        self._names: dict[tuple[int, str, str], str] = {}
        for name, found in names.items():
            assert found.layer is not None
            if (other := self._names.setdefault((found.layer, found.module, found.kind), name)) != name:
                raise AdapterError(f"{file.path}: tensors {quoted(other)} and {quoted(name)} are the same weight twice")
        layers = [layer for layer, has in enumerate(geometry.expert_layers) if has]
        self._sources = self._stacked(config, layers) + self._modules(config, layers)
        for field in ("use_dora", "lora_bias", "alora_invocation_tokens"):
            if self._sources and getattr(config, field):
                raise AdapterError(f"{field}: is not supported together with LoRA on experts; must be unset")

    def __bool__(self) -> bool:
        """True if the config targets experts."""
        return bool(self._sources)

    def _stacked(self, config: LoraConfig, layers: list[int]) -> list[_Source]:
        sources = []
        for layer, targets in resolve_parameters(config, layers, self._parent).items():
            for parameter, target in targets.items():
                module = STACKED[parameter == EXPERT_PARAMETERS[0] and len(targets) == 2]
                projections = EXPERT_PROJECTIONS[:2] if parameter == EXPERT_PARAMETERS[0] else EXPERT_PROJECTIONS[2:]
                sources.append(_Source(layer, module, projections, None, target))
        return sources

    def _modules(self, config: LoraConfig, layers: list[int]) -> list[_Source]:
        """The targets among the modules of transformers 4, in the spelling of the file.

        For a file without experts, one expert of each layer shows in every spelling whether they are targets: to match
        tens of thousands of names would take longer than all else.
        """
        if config.target_parameters:
            return []  # PEFT has renamed the targets of modules
        found = {module.split(".")[0] for _, module, _ in self._names}
        spellings = [one for one in SPELLINGS if one["gate"].split(".")[0] in found] or SPELLINGS
        places = {
            f"{self._parent}.layers.{layer}.{module.format(expert)}": (layer, module.format(expert), projection, expert)
            for spelling in spellings
            for layer in layers
            for projection, module in spelling.items()
            for expert in range(self._geometry.num_experts if found else min(1, self._geometry.num_experts))
        }
        targets = resolve_modules(config, places)
        return [_Source(places[n][0], places[n][1], (places[n][2],), places[n][3], t) for n, t in targets.items()]

    def check(self) -> np.ndarray:
        """Checks names, shapes and dtypes. Returns the ranks `[num_layers, E, 3]`.

        Raises:
          AdapterError: a tensor is missing, unexpected or misshapen.
        """
        geometry, expected = self._geometry, set()
        ranks = np.zeros((geometry.num_layers, geometry.num_experts, len(EXPERT_PROJECTIONS)), np.int32)
        for source in self._sources:
            count = geometry.num_experts if source.expert is None else 1
            d_in, d_out = geometry.expert_dims(source.projections[0])
            rank, d_out = count * source.target.rank, len(source.projections) * d_out
            for kind, shape in (("lora_A", [rank, d_in]), ("lora_B", [d_out, rank])):
                self._check(source, kind, shape)
                expected.add((source.layer, source.module, kind))
            own = slice(None) if source.expert is None else source.expert
            ranks[source.layer, own, [EXPERT_PROJECTIONS.index(p) for p in source.projections]] = source.target.rank
        for place, name in self._names.items():
            if place not in expected:
                raise AdapterError(
                    f"{self._file.path}: unexpected tensor {quoted(name)}: adapter_config.json does not target this "
                    "module, or the base model has no such expert"
                )
        return ranks

    def read(self) -> dict[ExpertKey, tuple[np.ndarray, np.ndarray]]:
        """Reads A `[r, d_in]` and scaled B `[d_out, r]`. Raises AdapterError if a value is not finite."""
        experts = {}
        for source in self._sources:
            rank, width = source.target.rank, self._geometry.expert_dims(source.projections[0])[1]
            a = self._read(source, "lora_A")
            b = self._read(source, "lora_B") * np.float32(source.target.scale)
            a, b = a.reshape(-1, rank, a.shape[1]), b.reshape(len(b), rank, -1)  # [E, r, d_in], [d_out, r, E]
            for number in range(len(a)):
                expert = number if source.expert is None else source.expert
                for at, projection in enumerate(source.projections):
                    own = b[at * width : (at + 1) * width, :, number]
                    experts[source.layer, projection, expert] = a[number], own
        return experts

    def _check(self, source: _Source, kind: str, shape: list[int]) -> None:
        name = self._names.get((source.layer, source.module, kind))
        if name is None:
            missing = quoted(str(TensorName(self._parent, source.layer, source.module, kind)))
            raise AdapterError(f"{self._file.path}: missing tensor {missing}, which adapter_config.json targets")
        entry = self._file.entries[name]
        if entry.dtype not in DTYPES:
            raise AdapterError(
                f"{self._file.path}: tensor {quoted(name)}: expected {', '.join(DTYPES)}, found {clipped(entry.dtype)}"
            )
        if entry.shape != shape:
            raise AdapterError(
                f"{self._file.path}: tensor {quoted(name)}: expected shape {shape}, found {entry.shape}: the rank "
                "differs from adapter_config.json, or the adapter was trained on another base model"
            )

    def _read(self, source: _Source, kind: str) -> np.ndarray:
        name = self._names[source.layer, source.module, kind]
        matrix = np.asarray(self._file.read(name), np.float32)
        if not np.isfinite(matrix).all():
            raise AdapterError(
                f"{self._file.path}: tensor {quoted(name)}: expected finite values, found NaN or infinity"
            )
        return matrix


def is_of_experts(name: TensorName | None) -> bool:
    """Returns whether a tensor is LoRA on experts."""
    if name is None or name.layer is None:
        return False
    return name.module.startswith(("mlp.experts", "block_sparse_moe.experts"))
