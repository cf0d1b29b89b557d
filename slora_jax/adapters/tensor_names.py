"""Tensor names of adapters: one normal form for the spellings of PEFT's versions, of wrappers, and of fused modules."""

from __future__ import annotations

import difflib
import re
from collections.abc import Collection, Iterable, Mapping
from typing import NamedTuple

from slora_jax.adapters.untrusted.quoting import clipped
from slora_jax.models.projections import PROJECTIONS

PREFIX = "base_model.model."
"""PEFT's prefix of every tensor name."""

PLAIN: dict[str, str] = {name: projection.module for name, projection in PROJECTIONS.items()}
"""Each projection's module within a layer, in a model with one module for each projection."""

FUSED: dict[str, tuple[str, ...]] = {
    "self_attn.qkv_proj": ("q", "k", "v"),
    "mlp.gate_up_proj": ("gate", "up"),
    "self_attention.query_key_value": ("q", "k", "v"),
    "mlp.dense_h_to_4h": ("gate", "up"),
}
"""Modules that compute several projections, one below the other in the rows of the weight (Phi-3, GLM-4)."""

RENAMED: dict[str, str] = {"self_attention.dense": "o", "mlp.dense_4h_to_h": "down"}
"""Other names of single projections (GLM-4)."""

_WRAPPERS = {"_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module", "module"}
"""Parts of a name that torch.compile, FSDP, activation checkpointing and DDP add."""

_PARENTS = ("model", "language_model", "model.language_model", "language_model.model", "transformer.encoder")
"""Modules that may contain the layers."""

_NAME = re.compile(
    r"(base_model\.model\.)?"
    rf"((?P<parent>{'|'.join(map(re.escape, _PARENTS))})\.)?"
    r"(layers\.(?P<layer>0|[1-9]\d{0,5})\.)?"
    r"(?P<module>(mlp|block_sparse_moe)\.experts\.(base_layer|(0|[1-9]\d{0,5})\.[a-z_][a-z0-9_]*)(?=\.lora_)"
    r"|(?!lora_)[a-z_][a-z0-9_]*(\.(?!lora_|base_layer|modules_to_save|token_adapter)[a-z_][a-z0-9_]*)?)\."
    r"((?P<matrix>lora_[AB])(\.[^.]+)?\.(?P<part>weight|bias)"
    r"|(?P<vector>lora_magnitude_vector|lora_embedding_[AB])(\.(?!weight$)[^.]+)?(\.weight)?"
    r"|token_adapter\.(?P<tokens>trainable_tokens_delta)(\.[^.]+)?"
    r"|(base_layer\.|modules_to_save\.([^.]+\.)?)?(?P<base>weight|bias))"
)


_WRITTEN = {
    "lora_A": "lora_A.weight",
    "lora_B": "lora_B.weight",
    "trainable_tokens_delta": "token_adapter.trainable_tokens_delta",
}
"""Kinds whose tensors have a longer name."""


class TensorName(NamedTuple):
    """A parsed tensor name.

    Attributes:
      parent: the module that contains the decoder's layers.
      layer: number of the layer; None for a tensor outside the layers.
      module: name of the module, within its layer if it has one.
      kind: "lora_A", "lora_B", "lora_B.bias", "lora_magnitude_vector", "lora_embedding_A", "lora_embedding_B",
        "trainable_tokens_delta", or "weight" and "bias" for a module's own parameters.
    """

    parent: str
    layer: int | None
    module: str
    kind: str

    def __str__(self) -> str:
        """The name as PEFT writes it today."""
        place = [] if self.layer is None else ["layers", str(self.layer)]
        kind = _WRITTEN.get(self.kind, self.kind)
        return PREFIX + ".".join([self.parent, *place, self.module, kind])


def parse(name: str) -> TensorName | None:
    """Parses a tensor's name; None unless it has the form of an adapter's tensor.

    Parts that wrappers and adapter names add are skipped, PEFT's prefix is optional, and the layers may belong to the
    language model of a multimodal model.
    """
    match = _NAME.fullmatch(".".join(part for part in name.split(".") if part not in _WRAPPERS))
    if match is None:
        return None
    kind = match["matrix"] or match["vector"] or match["tokens"] or match["base"]
    if match["part"] == "bias":
        kind += ".bias"
    layer = None if match["layer"] is None else int(match["layer"])
    return TensorName(match["parent"] or "model", layer, match["module"], kind)


def modules_of(names: Iterable[TensorName | None]) -> dict[str, str]:
    """Each projection's module within a layer, in the spelling of these tensor names."""
    found = {name.module for name in names if name is not None and name.layer is not None}
    modules = dict(PLAIN)
    for module, projections in (FUSED | {name: (projection,) for name, projection in RENAMED.items()}).items():
        if module in found and not any(PLAIN[projection] in found for projection in projections):
            modules |= dict.fromkeys(projections, module)
    return modules


def by_module(modules: Mapping[str, str]) -> dict[str, tuple[str, ...]]:
    """The inverse of `modules_of`: each module's projections, in the order of its rows."""
    return {module: tuple(p for p in modules if modules[p] == module) for module in modules.values()}


def nearest(name: str, parsed: TensorName | None, modules: Collection[str]) -> str | None:
    """The known tensor name most similar to `name`, if any is, and `name` is unknown.

    Args:
      parsed: `parse(name)`.
      modules: names within a layer that the adapter may have.
    """
    if parsed is not None and parsed.module in modules:
        return None
    parent, layer = ("model", 0) if parsed is None else (parsed.parent, parsed.layer or 0)
    known = [str(TensorName(parent, layer, module, kind)) for module in modules for kind in ("lora_A", "lora_B")]
    return next(iter(difflib.get_close_matches(clipped(name), known, n=1)), None)
