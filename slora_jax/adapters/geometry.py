"""What an adapter must know of its base model: widths, layer count, and the full names of its projections."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

from pallas_kernels.lora.layout import LoraLayout
from slora_jax.errors import ConfigError
from slora_jax.models.projections import PROJECTIONS, lora_layout
from slora_jax.parallel.layout import ONE_DEVICE, Shards
from slora_jax.typed import Count, check_fields


def module_name(layer: int, projection: str, parent: str = "model") -> str:
    """The module's full Hugging Face name, e.g. `model.layers.0.self_attn.q_proj`. parent: what holds the layers."""
    return f"{parent}.layers.{layer}.{PROJECTIONS[projection].module}"


@dataclass(frozen=True)
class BaseGeometry:
    """Widths of a Llama-like base model, in elements, and the pool's `page_size`, in tokens (= rows of a tile).

    `q_width` is `num_heads * head_dim` and `kv_width` is `num_kv_heads * head_dim`, the pool's W on one device.
    `shards` tells how adapters are cut.
    """

    num_layers: Count
    hidden_size: Count
    q_width: Count
    kv_width: Count
    intermediate_size: Count
    page_size: Count
    shards: Shards = ONE_DEVICE

    def __post_init__(self) -> None:
        check_fields(self)

    @cached_property
    def whole(self) -> LoraLayout:
        """The layout of the whole model's adapters on one device."""
        return lora_layout(self, self.page_size)

    @cached_property
    def layout(self) -> LoraLayout:
        """Where every row of an adapter of this base model lies in a shard's tiles."""
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
