"""Base models whose layers the kernels are compiled for; of the 70B model, the shard of one of eight devices."""

from pallas_kernels.bench.models import LLAMA_3_8B, LLAMA_7B, Model

LAYERS = (
    LLAMA_7B,
    Model("llama-13b", 5120, 40, 40, 128, 13824, num_layers=40, vocab=32000, max_tokens=4096),
    LLAMA_3_8B,
    Model("llama-3-70b/8", 8192, 8, 1, 128, 3584, num_layers=80, vocab=128256, max_tokens=8192),
    Model("qwen3-8b", 4096, 32, 8, 128, 12288, num_layers=36, vocab=151936, max_tokens=40960),
)
