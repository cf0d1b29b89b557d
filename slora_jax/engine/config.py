"""The engine's settings, validated once. The import is light: the command line reads its defaults here."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Literal, get_args

from slora_jax.scheduling.config import CoreConfig
from slora_jax.typed import Count, Natural, Range, checks_keywords

Dtype = Literal["auto", "bfloat16", "float32"]
DTYPES = get_args(Dtype)

DEFAULT_COMPILATION_CACHE = "~/.cache/slora-jax/xla"


@dataclass(frozen=True, order=True)
class Bucket:
    """Static shape of a step program: at most `tokens` rows of at most `seqs` sequences. In a *decode* program every
    sequence has one row (`tokens == seqs`); a *mixed* one takes prefill chunks and decoding sequences together."""

    tokens: int
    seqs: int
    decode: bool

    @property
    def name(self) -> str:
        return f"decode_{self.seqs}" if self.decode else f"mixed_{self.tokens}"

    @property
    def prefill_tile_rows(self) -> int:
        """Most rows of a prefill attention tile."""
        return min(self.tokens, 64)


@checks_keywords
@dataclass(frozen=True)
class EngineConfig(CoreConfig):
    """Settings of an `Engine`, beside those of `CoreConfig`.

    Attributes:
      dtype: of weights, KV and adapters; "auto": float32 on a CPU, where bfloat16 is slower (and takes half the
        memory), and bfloat16 elsewhere.
      page_size: 8, 16 or 32.
      num_pages: pages of the unified pool, the dummy page included; None: sized from free device memory by
        `gpu_memory_utilization` (of several processes, that of the one with the least). On a CPU, from an eighth of the
        host's memory, less if that is not free. The number is rounded down, so that every start finds the programs that
        an earlier one compiled.
      max_model_len: most tokens of prompt and output together; None: the model's own limit.
      prefix_cache: a prompt that is found is not computed again, so it falls into other chunks: the last bits of the
        logits may differ from those without.
      adapter_pages: pages set aside for adapters, as in the baseline `no-unify-mem`; None: one pool for both.
      max_lora_rank: largest rank accepted of one projection; bounds a device table, reserves nothing else.
      spill_dir: where adapters beyond `host_adapter_bytes` go; None: a temporary directory, removed at the end.
        Adapters on their way to the device (about `prefetch`) stay in memory beside the budget.
      seed: of the random streams of requests that have none.
      decode_buckets, mixed_buckets: rows of the compiled step programs: for steps in which every sequence decodes one
        token, and for steps with prefill; None: chosen from max_num_seqs and max_num_batched_tokens.
      kernels: "auto" (what the plan tables name for the device), "xla", "triton" or "mosaic_gpu", of LoRA and attention
        (without a GPU, the last two run by their interpreters: slow, for study and tests).
      tensor_parallel_size: of several processes (`join_processes`), all devices together.
      tp_first_device: the first of the devices, which follow one another in `jax.devices()`: several engines can each
        have a group (data parallelism).
      lora: how adapters are served. "paged": gathered from the unified pool, any mix of them in a step. The others are
        baselines of the paper's evaluation. "bmm": by batched products over zero-padded weights and rows
        (`pallas_kernels.lora.bmm`). "merge": merged into the base weights, one adapter at a time (`engine.merge`),
        under the policy `OneAdapter`. "off": requests name adapters, but the base model answers; nothing is loaded.
      compile_ahead: True compiles every program before the first request, so that none is compiled while requests wait.
        False compiles each when it is first used: for a process that answers a request or two.
      keep_logits: outputs carry each generated token's float32 logits (for research; costs a copy of [seqs, vocab]).
      compilation_cache_dir: directory of compiled programs: JAX's persistent compilation cache, and on a CPU the
        engine's own (`engine.program_cache`) in `programs/`. It must be writable by your account only: entries can run
        code. A cache that JAX is configured with already is left alone. None: none.
      model_cache_dir: Orbax cache of converted weights; None: none. Several processes do without: each reads its own
        part of the checkpoint.
      progress: progress bars on stderr for loading and compiling.
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
    compile_ahead: bool = True
    keep_logits: bool = False
    compilation_cache_dir: str | Path | None = DEFAULT_COMPILATION_CACHE
    model_cache_dir: str | Path | None = None
    progress: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require(
            self.max_num_batched_tokens >= self.max_num_seqs,
            "max_num_batched_tokens",
            f"at least max_num_seqs={self.max_num_seqs}, so that every running sequence gets its token",
        )
        if self.kernels != "auto":
            from pallas_kernels.paged_attention.api import IMPLEMENTATIONS  # imports JAX

            self.require(self.kernels in IMPLEMENTATIONS, "kernels", f"'auto' or one of {IMPLEMENTATIONS}")
        if self.tensor_parallel_size == 1:
            self.require(self.tp_first_device == 0, "tp_first_device", "0, unless tensor_parallel_size > 1")
        else:
            self.require(
                self.lora in ("paged", "off"), "lora", "'paged' or 'off' over several devices (tensor_parallel_size)"
            )
        for name, most in (("decode_buckets", "max_num_seqs"), ("mixed_buckets", "max_num_batched_tokens")):
            buckets, largest = getattr(self, name), getattr(self, most)
            self.require(
                buckets is None or max(buckets, default=0) == largest,
                name,
                f"None or positive integers, the largest equal to {most}={largest}",
            )

    def with_dtype(self) -> EngineConfig:
        """Decides "auto". JAX must be free to look for devices (`join_processes` comes first)."""
        if self.dtype != "auto":
            return self
        import jax

        return replace(self, dtype="float32" if jax.default_backend() == "cpu" else "bfloat16")

    def buckets(self) -> tuple[Bucket, ...]:
        """The step programs' shapes: decode programs, smallest first, then mixed ones, smallest first."""
        decode = self.decode_buckets or {min(n, self.max_num_seqs) for n in (8, 32, self.max_num_seqs)}
        most = self.max_num_batched_tokens
        mixed = self.mixed_buckets or {max(1, min(4 * self.max_num_seqs, most // 4)), most}
        return (
            *(Bucket(tokens=n, seqs=n, decode=True) for n in sorted(decode)),
            *(Bucket(tokens=n, seqs=min(n, self.max_num_seqs), decode=False) for n in sorted(mixed)),
        )
