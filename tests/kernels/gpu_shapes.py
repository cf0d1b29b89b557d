"""Layers of real models, as the kernels see them on one device."""

from dataclasses import dataclass

from pallas_kernels.lora import LoraLayout


@dataclass(frozen=True)
class Layer:
    """Widths of one decoder layer (of one shard of it, for tensor-parallel models)."""

    name: str
    hidden: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    ffn: int

    @property
    def width(self) -> int:
        return self.num_kv_heads * self.head_dim

    def layout(self, page_size: int = 16) -> LoraLayout:
        return LoraLayout.of_decoder(self.hidden, self.num_heads * self.head_dim, self.width, self.ffn, page_size)


LAYERS = (
    Layer("llama-7b", 4096, 32, 32, 128, 11008),
    Layer("llama-13b", 5120, 40, 40, 128, 13824),
    Layer("llama-3-8b", 4096, 32, 8, 128, 14336),
    Layer("llama-3-70b/8", 8192, 8, 1, 128, 3584),
    Layer("qwen3-8b", 4096, 32, 8, 128, 12288),
)
