"""The destination of each tensor of a checkpoint in the decoder's fused `[in, out]` parameters."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator

import numpy as np

from slora_jax.models.config import ModelConfig
from slora_jax.models.families.registry import FAMILIES
from slora_jax.models.projections import PROJECTIONS, STACKS
from slora_jax.parallel.layout import ONE_DEVICE, Shards

EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"

ParamPath = tuple[str | int, ...]


@dataclasses.dataclass(frozen=True)
class Placement:
    """Destination of a checkpoint tensor: columns from `column` on of the parameter at `path`.

    Attributes:
      shape: the tensor's shape in the checkpoint.
      transposed: true for kernels.
      rows: ranges of the tensor's rows to copy, side by side; default: all. A fused tensor has one for each projection.
      inputs: columns of the tensor to copy; default: all.
      expert: index in the parameter's first axis, if it has an axis of experts.
      offset: added to each element.
    """

    path: ParamPath
    shape: tuple[int, ...]
    column: int = 0
    transposed: bool = False
    rows: tuple[slice, ...] = ()
    inputs: slice | None = None
    expert: int | None = None
    offset: float = 0.0

    def __post_init__(self) -> None:
        if not self.rows:
            object.__setattr__(self, "rows", (slice(0, self.shape[0]),))
        if self.inputs is None and len(self.shape) == 2:
            object.__setattr__(self, "inputs", slice(0, self.shape[1]))

    @property
    def columns(self) -> tuple[slice, ...]:
        """The index of the tensor's second axis, if it has one."""
        return () if self.inputs is None else (self.inputs,)

    @property
    def num_rows(self) -> int:
        """Rows of the part."""
        return sum(rows.stop - rows.start for rows in self.rows)

    @property
    def size(self) -> int:
        """Elements of the part."""
        return self.num_rows * math.prod(axis.stop - axis.start for axis in self.columns)

    def target(self, parameter: np.ndarray) -> np.ndarray:
        """The part's view of its whole parameter, rows first: `[rows, inputs]`, or `[rows]`."""
        array = parameter if self.expert is None else parameter[self.expert]
        return (array.T if self.transposed else array)[self.column : self.column + self.num_rows]


def tensor_placements(config: ModelConfig, shards: Shards = ONE_DEVICE, shard: int = 0) -> dict[str, Placement]:
    """All tensors required in a checkpoint of this config, by Hugging Face name, with a shard's part of each."""
    d = config.hidden_size
    family, vocabulary = FAMILIES[config.family], (shards.vocabulary(config.vocab_size, shard),)
    placements = {
        EMBEDDING: Placement(("embed", "embedding"), (config.vocab_size, d), rows=vocabulary),
        "model.norm.weight": Placement(("norm", "scale"), (d,), offset=family.norm_offset),
    }
    if not config.tie_word_embeddings:
        placements[HEAD] = Placement(("lm_head", "kernel"), (config.vocab_size, d), transposed=True, rows=vocabulary)
    norms = [(name, module, d) for name, module in family.norms.items()]
    if config.qk_norm:
        widths = {"head": (config.head_dim, config.head_dim), "width": (config.q_width, config.kv_width)}[
            config.qk_norm
        ]
        norms += [("q_norm", "self_attn.q_norm", widths[0]), ("k_norm", "self_attn.k_norm", widths[1])]
    for index, kind in enumerate(config.kinds):
        prefix, layer = f"model.layers.{index}", ("layers", index)
        for norm, module, features in norms:
            placements[f"{prefix}.{module}.weight"] = Placement(
                (*layer, norm, "scale"), (features,), offset=family.norm_offset
            )
        stacks = ("qkv", "o") if kind.has_experts else STACKS
        for stack in stacks:
            for module, placement in _stack(config, stack, layer, shards, shard):
                placements[f"{prefix}.{module}"] = placement
        if kind.has_experts:
            placements |= {f"{prefix}.{module}": one for module, one in _experts(config, layer, shards, shard)}
    return placements


def _stack(
    config: ModelConfig, stack: str, layer: ParamPath, shards: Shards, shard: int
) -> Iterator[tuple[str, Placement]]:
    """The tensors of a stack in one layer, by name within the layer."""
    has_bias = {"qkv": config.qkv_bias, "o": config.o_bias, "gate_up": config.mlp_bias, "down": config.mlp_bias}[stack]
    projections = [PROJECTIONS[name] for name in STACKS[stack]]
    fused = FAMILIES[config.family].fused.get(stack)
    groups = [(one.module, [one]) for one in projections] if fused is None else [(fused, projections)]
    column = 0
    for module, group in groups:
        first, rows = 0, []
        for projection in group:
            d_in, d_out = projection.dims(config)
            part = slice(0, d_out) if projection.row_parallel else shards.outputs(projection.name, d_out, shard)
            rows.append(slice(first + part.start, first + part.stop))
            first += d_out
        inputs = shards.part(d_in, shard) if group[0].row_parallel else slice(0, d_in)
        weight = Placement((*layer, stack, "kernel"), (first, d_in), column, True, tuple(rows), inputs)
        yield f"{module}.weight", weight
        if has_bias:
            # Row-parallel outputs are summed over shards, so only the first shard adds the bias.
            own = (slice(0, 0),) if group[0].row_parallel and shard else tuple(rows)
            yield f"{module}.bias", Placement((*layer, stack, "bias"), (first,), column, rows=own)
        column += weight.num_rows


def _experts(config: ModelConfig, layer: ParamPath, shards: Shards, shard: int) -> Iterator[tuple[str, Placement]]:
    """The tensors of the router and the experts of one layer, by name within the layer. Experts are split by column,
    like a feed-forward part."""
    family, experts, d = FAMILIES[config.family], config.experts, config.hidden_size
    assert experts is not None
    width, path = experts.intermediate_size, (*layer, "experts")
    yield f"{family.router}.weight", Placement((*path, "router"), (experts.count, d), transposed=True)
    part = shards.part(width, shard)
    size = part.stop - part.start
    for number in range(experts.count):
        for column, name in ((0, "gate"), (size, "up")):
            module = family.expert[name].format(expert=number)
            placement = Placement((*path, "gate_up"), (width, d), column, True, (part,), expert=number)
            yield f"{module}.weight", placement
        module = family.expert["down"].format(expert=number)
        yield f"{module}.weight", Placement((*path, "down"), (d, width), 0, True, inputs=part, expert=number)
