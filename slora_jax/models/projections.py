"""The seven projections of a decoder layer that can have LoRA: names, widths, stacks."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from pallas_kernels.lora.layout import LoraLayout, Stack


@dataclass(frozen=True)
class Projection:
    """One projection of a decoder layer.

    Attributes:
      stack: the fused kernel of all projections with the same input.
      module: Hugging Face name within a layer.
      gguf: GGUF name within a layer.
      d_in, d_out: names of the width attributes in `ModelConfig`, `BaseGeometry` and `ModelShape`.
    """

    name: str
    stack: str
    module: str
    gguf: str
    d_in: str
    d_out: str

    @property
    def row_parallel(self) -> bool:
        """Returns whether the base weight is sharded by inputs, with outputs summed over shards; otherwise it is
        sharded by outputs."""
        return self.d_out == "hidden_size"

    def dims(self, model: Any) -> tuple[int, int]:
        """`(d_in, d_out)` of the base weight in a model with these widths."""
        return getattr(model, self.d_in), getattr(model, self.d_out)


PROJECTIONS = {
    projection.name: projection
    for projection in (
        Projection("q", "qkv", "self_attn.q_proj", "attn_q", "hidden_size", "q_width"),
        Projection("k", "qkv", "self_attn.k_proj", "attn_k", "hidden_size", "kv_width"),
        Projection("v", "qkv", "self_attn.v_proj", "attn_v", "hidden_size", "kv_width"),
        Projection("o", "o", "self_attn.o_proj", "attn_output", "q_width", "hidden_size"),
        Projection("gate", "gate_up", "mlp.gate_proj", "ffn_gate", "hidden_size", "intermediate_size"),
        Projection("up", "gate_up", "mlp.up_proj", "ffn_up", "hidden_size", "intermediate_size"),
        Projection("down", "down", "mlp.down_proj", "ffn_down", "intermediate_size", "hidden_size"),
    )
}
"""Projections by name, in the order of the kernels' rank vectors."""

STACKS = {
    stack: tuple(p.name for p in PROJECTIONS.values() if p.stack == stack)
    for stack in dict.fromkeys(p.stack for p in PROJECTIONS.values())
}
"""Names of each stack's projections, in the order of the fused kernel."""

ROW_PARALLEL = frozenset(p.stack for p in PROJECTIONS.values() if p.row_parallel)
"""Stacks of row-parallel projections; each holds one."""


def lora_layout(model: Any, page_size: int) -> LoraLayout:
    """Returns the layout of a model's adapters in their pages, on one device."""
    stacks = []
    for stack, names in STACKS.items():
        d_ins, d_outs = zip(*(PROJECTIONS[name].dims(model) for name in names), strict=True)
        stacks.append(Stack(stack, names, d_ins[0], d_outs))
    return LoraLayout(tuple(stacks), page_size, model.kv_width)
