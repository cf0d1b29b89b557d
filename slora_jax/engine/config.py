"""The engine's settings. Imports no JAX, because the command line reads its defaults here."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal, get_args

from slora_jax.scheduling.config import CoreConfig
from slora_jax.typed import Count, Natural, Range, checks_keywords

if TYPE_CHECKING:
    from slora_jax.models.config import ModelConfig

Dtype = Literal["auto", "bfloat16", "float32"]
DTYPES = get_args(Dtype)

DEFAULT_COMPILATION_CACHE = "~/.cache/slora-jax/xla"


@dataclass(frozen=True, order=True)
class Bucket:
    """Static shape of a step program.

    Attributes:
      tokens: maximum number of tokens.
      seqs: maximum number of sequences.
      decode: True for programs in which every sequence has one token (`tokens == seqs`); False for mixed programs,
        which also take prefill chunks.
      pools: True for mixed programs that also return pooled hidden states.
    """

    tokens: int
    seqs: int
    decode: bool
    pools: bool = False

    @property
    def name(self) -> str:
        if self.decode:
            return f"decode_{self.seqs}"
        return f"pooled_{self.tokens}" if self.pools else f"mixed_{self.tokens}"

    @property
    def prefill_tile_rows(self) -> int:
        """Maximum tokens of a prefill attention tile."""
        return min(self.tokens, 64)


@checks_keywords
@dataclass(frozen=True)
class EngineConfig(CoreConfig):
    """Settings of an `Engine`, in addition to those of `CoreConfig`.

    Attributes:
      dtype: dtype of weights, KV and adapters (with a narrow `kv_dtype`, adapters are bfloat16); "auto" is float32 on a
        CPU, where bfloat16 is slower, and bfloat16 elsewhere.
      page_size: 8, 16 or 32; with a narrow `kv_dtype` 16 or 32.
      num_pages: pages of the unified pool, including the dummy page. None derives it from the free device memory and
        `gpu_memory_utilization` (with several processes, the minimum over them), and on a CPU from an eighth of the
        host memory, or less if that is not free. The derived number is rounded down to a coarse grid, so that later
        starts can reuse compiled programs.
      max_model_len: maximum tokens of prompt and output together; None is the model's limit.
      prefix_cache: the uncached rest of a prompt may be computed in other chunks, so the last bits of the logits may
        differ from a run without the cache.
      adapter_pages: pages reserved for adapters, as in the baseline `no-unify-mem`; None is one pool for both.
      max_lora_rank: largest accepted rank of a projection. It sizes a small device table and reserves no pages.
      spill_dir: directory for adapters beyond `host_adapter_bytes`; None is a temporary one. Adapters being uploaded
        (about `prefetch` of them) stay in memory in addition to the budget.
      seed: seed for requests without one of their own.
      decode_buckets, mixed_buckets: token counts of the compiled step programs, for steps with one token per sequence
        and for steps with prefill. None derives them from max_num_seqs and max_num_batched_tokens.
      kernels: LoRA and attention kernels: "auto" (the plan tables' choice for the device), "xla", "triton" or
        "mosaic_gpu": attention of steps with prefill by Mosaic GPU, all else by Triton. Without a GPU, the last two run
        in slow interpreters, for tests.
      tensor_parallel_size: with several processes (`join_processes`), the number of all their devices.
      tp_first_device: index in `jax.devices()` of the first of these consecutive devices, so that several engines can
        each use a group (data parallelism).
      lora: how adapters are applied. "paged" gathers them from the unified pool, in any mix per step. The others are
        baselines of the paper: "bmm" uses batched products over zero-padded weights and tokens
        (`pallas_kernels.lora.bmm`); "merge" merges one adapter at a time into the base weights (`engine.merge`) and
        needs the policy `OneAdapter`; "off" ignores the adapters that requests name.
      adapter_extras: whether adapters are served that are more than LoRA on projections: DoRA, biases, LoRA on experts,
        changes of the head and the embedding. True compiles one more program for every batch size (half as many again
        at the start; two more for a model with experts), which runs the steps that have such an adapter; other steps
        are not affected. False refuses them by name. Over several devices, LoRA on experts and changes of the head and
        the embedding are refused; over several processes, all.
      compile_ahead: True compiles all programs before the first request. False compiles each at its first use, which
        suits a process that serves only a few requests.
      keep_logits: whether outputs contain the float32 logits of each token, which costs a copy of [seqs, vocab] per
        step.
      embeddings: whether requests may ask for `SamplingParams.prompt_embedding`. It adds a program per mixed bucket,
        which runs in steps with such a request only.
      compilation_cache_dir: directory of compiled programs: JAX's persistent compilation cache, and on a CPU the
        engine's own (`engine.program_cache`) in `programs/`. Entries can execute code, so only your account may have
        write access. A cache already configured in JAX takes precedence. None disables both.
      model_cache_dir: Orbax cache of converted weights; None disables it. Not used with several processes, each of
        which reads its part of the checkpoint.
      progress: whether to show progress bars on stderr.
    """

    page_size: Literal[8, 16, 32] = 16
    dtype: Dtype = "auto"
    num_pages: Annotated[int, Range(least=2)] | None = None
    max_model_len: Annotated[int, Range(least=2)] | None = None
    adapter_pages: Count | None = None
    host_adapter_bytes: Count = 8 << 30
    max_lora_rank: Annotated[int, Range(least=1, most=256)] = 256
    spill_dir: str | Path | None = None
    seed: Annotated[int, Range(least=0, most=2**32 - 1)] = 0
    decode_buckets: tuple[Count, ...] | None = None
    mixed_buckets: tuple[Count, ...] | None = None
    kernels: str = "auto"
    tp_first_device: Natural = 0
    lora: Literal["paged", "bmm", "merge", "off"] = "paged"
    adapter_extras: bool = False
    compile_ahead: bool = True
    keep_logits: bool = False
    embeddings: bool = False
    compilation_cache_dir: str | Path | None = DEFAULT_COMPILATION_CACHE
    model_cache_dir: str | Path | None = None
    progress: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require(
            self.max_num_batched_tokens >= self.max_num_seqs,
            "max_num_batched_tokens",
            f"at least max_num_seqs={self.max_num_seqs}, one token per running sequence",
        )
        if self.kernels != "auto":
            from pallas_kernels.paged_attention.api import IMPLEMENTATIONS  # imports JAX

            self.require(self.kernels in IMPLEMENTATIONS, "kernels", f"'auto' or one of {IMPLEMENTATIONS}")
        if self.kv_dtype != "auto":
            self.require(self.page_size >= 16, "page_size", f"16 or 32 with kv_dtype={self.kv_dtype!r}")
            self.require(self.lora in ("paged", "off"), "lora", f"'paged' or 'off' with kv_dtype={self.kv_dtype!r}")
            self.require(self.kernels != "mosaic_gpu", "kernels", "'auto', 'xla' or 'triton' with a narrow kv_dtype")
        if self.tensor_parallel_size == 1:
            self.require(self.tp_first_device == 0, "tp_first_device", "0, unless tensor_parallel_size > 1")
        else:
            self.require(
                self.lora in ("paged", "off"), "lora", "'paged' or 'off' over several devices (tensor_parallel_size)"
            )
        if self.adapter_extras:
            self.require(self.lora == "paged", "adapter_extras", "False, unless lora='paged'")
        for name, most in (("decode_buckets", "max_num_seqs"), ("mixed_buckets", "max_num_batched_tokens")):
            buckets, largest = getattr(self, name), getattr(self, most)
            self.require(
                buckets is None or max(buckets, default=0) == largest,
                name,
                f"None or positive integers, the largest equal to {most}={largest}",
            )

    def with_dtype(self) -> EngineConfig:
        """Resolves "auto". Initializes JAX's devices, so `join_processes` must come first."""
        if self.dtype != "auto":
            return self
        import jax

        return replace(self, dtype="float32" if jax.default_backend() == "cpu" else "bfloat16")

    def of_model(self, model: ModelConfig) -> ModelConfig:
        """Returns the model with its kernels in the format `weights`."""
        return model if self.weights == "auto" else replace(model, weights=self.weights)

    def buckets(self) -> tuple[Bucket, ...]:
        """Returns the shapes of the step programs: decode, mixed, mixed with pooling, each in ascending size."""
        decode = self.decode_buckets or {min(n, self.max_num_seqs) for n in (8, 32, self.max_num_seqs)}
        most = self.max_num_batched_tokens
        mixed = self.mixed_buckets or {max(1, min(4 * self.max_num_seqs, most // 4)), most}
        return (
            *(Bucket(tokens=n, seqs=n, decode=True) for n in sorted(decode)),
            *(
                Bucket(tokens=n, seqs=min(n, self.max_num_seqs), decode=False, pools=pools)
                for pools in ((False, True) if self.embeddings else (False,))
                for n in sorted(mixed)
            ),
        )
