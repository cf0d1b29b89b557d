"""Settings of the comparison: model, adapters, requests, and what each side is started with."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Settings:
    """Both sides run in float32, without prefix caching, with the same limits on sequences and tokens of a step.

    Attributes:
      model: a file of `experiments/models`, whose weights are random, unless the command is given a model.
      adapters: served by both sides, of `ranks` in turn, on q, k, v, o. vLLM holds all of them at once.
      requests: prompts of prompt_low..prompt_high tokens, with `output` new tokens each, all present at the start.
      many_adapters: two numbers of adapters of rank `many_rank`, for slora-jax alone, over `many_requests` requests.
      max_num_seqs, max_num_batched_tokens, max_model_len: limits of both sides.
      num_pages: slora-jax's pool.
      vllm_kv_gib: vLLM's KV cache in GiB.
      vllm_eager: whether vLLM runs without torch.compile.
      rounds: timed repetitions of phases base and alone. lora_rounds: of phase lora, of which vLLM takes minutes each.
    """

    model: str = "llama-110m"
    adapters: int = 32
    ranks: tuple[int, ...] = (8, 16, 32, 64)
    requests: int = 64
    prompt_low: int = 16
    prompt_high: int = 128
    output: int = 32
    many_adapters: tuple[int, int] = (5, 1000)
    many_rank: int = 16
    many_requests: int = 128
    max_num_seqs: int = 64
    max_num_batched_tokens: int = 256
    max_model_len: int = 512
    num_pages: int = 1400
    vllm_kv_gib: int = 2
    vllm_eager: bool = True
    rounds: int = 5
    lora_rounds: int = 3
    seed: int = 0

    def slora_engine(self) -> dict[str, Any]:
        """Fields of `EngineConfig`."""
        return {
            "dtype": "float32",
            "num_pages": self.num_pages,
            "max_num_seqs": self.max_num_seqs,
            "max_num_batched_tokens": self.max_num_batched_tokens,
            "max_model_len": self.max_model_len,
            "max_lora_rank": max(*self.ranks, self.many_rank),
            "prefix_cache": False,
            "host_adapter_bytes": 12 << 30,
            "progress": False,
        }

    def vllm_engine(self, lora: bool) -> dict[str, Any]:
        """Arguments of `vllm.LLM`. Without LoRA, vLLM runs its plain layers."""
        arguments = {
            "dtype": "float32",
            "max_num_seqs": self.max_num_seqs,
            "max_num_batched_tokens": self.max_num_batched_tokens,
            "max_model_len": self.max_model_len,
            "enable_prefix_caching": False,
            "enforce_eager": self.vllm_eager,
            "skip_tokenizer_init": True,
            "disable_log_stats": True,
        }
        if lora:
            arguments |= {
                "enable_lora": True,
                "max_loras": self.adapters,
                "max_cpu_loras": self.adapters,
                "max_lora_rank": max(self.ranks),
            }
        return arguments


QUICK = Settings(
    model="small-llama", adapters=3, ranks=(8, 16), requests=6, prompt_high=24, output=4,
    many_adapters=(2, 10), many_rank=8, many_requests=10, max_num_seqs=8, max_num_batched_tokens=32, max_model_len=64,
    num_pages=200, vllm_kv_gib=1, rounds=2, lora_rounds=2,
)  # fmt: skip
"""A toy model, to see that the command works; its numbers mean nothing. Its heads are of 32, the smallest of vLLM's CPU
attention."""
