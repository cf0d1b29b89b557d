"""Properties of a base model that its adapters depend on: widths, layer count, and full names of projections."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property

from pallas_kernels.lora.layout import LoraLayout
from slora_jax.errors import ConfigError
from slora_jax.models.projections import PROJECTIONS, lora_layout
from slora_jax.parallel.layout import ONE_DEVICE, Shards
from slora_jax.typed import Count, Natural, check_fields


def module_name(layer: int, projection: str, parent: str = "model") -> str:
    """The full Hugging Face name, e.g. `model.layers.0.self_attn.q_proj`; `parent` is the module with the layers."""
    return f"{parent}.layers.{layer}.{PROJECTIONS[projection].module}"


@dataclass(frozen=True)
class BaseGeometry:
    """Widths of a Llama-like base model, in elements, and the pool's page size.

    Attributes:
      q_width: `num_heads * head_dim`.
      kv_width: `num_kv_heads * head_dim`, the pool's W on one device.
      page_size: rows of a tile, the tokens of a page (half of them with `kv_dtype`).
      shards: division of adapters among devices.
      vocab_size: tokens of the vocabulary; 0: unknown, and adapters of head and embedding cannot be placed.
      expert_layers: whether each layer's feed-forward part consists of experts; empty: none does.
      num_experts, expert_width: number of experts of such a layer, and the width of an expert's hidden layer.
    """

    num_layers: Count
    hidden_size: Count
    q_width: Count
    kv_width: Count
    intermediate_size: Count
    page_size: Count
    shards: Shards = ONE_DEVICE
    vocab_size: Natural = 0
    expert_layers: tuple[bool, ...] = ()
    num_experts: Natural = 0
    expert_width: Natural = 0

    def __post_init__(self) -> None:
        check_fields(self)

    @cached_property
    def whole(self) -> LoraLayout:
        """The layout of the whole model's adapters on one device."""
        layout = lora_layout(self, self.page_size)
        layout = replace(layout, experts=self.num_experts, expert_width=self.expert_width)
        return replace(layout, num_layers=self.num_layers, vocab_size=self.vocab_size)

    @cached_property
    def layout(self) -> LoraLayout:
        """The layout of this base model's adapters in one shard's tiles."""
        return self.shards.of_layout(self.whole)

    @property
    def pool_width(self) -> int:
        """Columns of a page over all shards."""
        return self.shards.count * self.layout.width

    def dims(self, projection: str) -> tuple[int, int]:
        """`(d_in, d_out)` of a projection's base weight."""
        if projection not in PROJECTIONS:
            raise ConfigError(f"unknown projection {projection!r}; expected one of {', '.join(PROJECTIONS)}")
        return PROJECTIONS[projection].dims(self)

    def expert_dims(self, projection: str) -> tuple[int, int]:
        """`(d_in, d_out)` of an expert's gate, up or down."""
        dims = self.hidden_size, self.expert_width
        return dims[::-1] if projection == "down" else dims
