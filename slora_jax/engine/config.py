"""The engine's settings, validated once. The import is light: the command line reads its defaults here."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from slora_jax.errors import ConfigError
from slora_jax.parallel.layout import LORA_SHARDINGS, LoraSharding
from slora_jax.scheduling.admission import ADMISSIONS
from slora_jax.typed import checks_keywords

LORA = ("paged", "bmm", "merge", "off")
"""Ways to serve adapters: the system's own, and the baselines that it is compared with."""

DTYPES = ("auto", "bfloat16", "float32")

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
class EngineConfig:
    """Settings of an `Engine`.

    dtype: "float32" or "bfloat16", of weights, KV and adapters; "auto": float32 on a CPU, where bfloat16 is slower (and
      takes half the memory), and bfloat16 elsewhere.
    num_pages: pages of the unified pool, the dummy page included; None sizes it from free device memory (of several
      processes, that of the one with the least).
    memory_fraction: share of the free device memory that `num_pages=None` may fill; on a CPU, of an eighth of the
      host's memory (less if that is not free). The number of pages is rounded down, so that every start finds the
      programs that an earlier one compiled.
    page_size: tokens of a KV page, rows of an adapter tile: 8, 16 or 32.
    max_seqs: sequences running at once.
    max_tokens_per_step: rows of one step: decoding sequences, and prompts in chunks.
    max_model_len: most tokens of prompt and output together; None: the model's own limit.
    admission: "optimistic" (what fits now; preempts when pages run out) or "reserve" (what fits with all output that it
      may still have, as in the paper).
    adapter_pages: pages set aside for adapters, as in the baseline `no-unify-mem`; None: one pool for adapters and KV.
    prefix_cache: whether requests share the pages of equal beginnings, prompts and earlier answers, under the same
      adapter. A prompt that is found is not computed again, so it falls into other chunks: the last bits of the logits
      may differ from those without.
    adapter_slots: adapters resident in the pool at once; None: as many as could fit, at most 4096.
    prefetch: adapters brought ahead of the requests that wait for them, and not used yet: read from disk and copied to
      the pool while others run. 0: each is uploaded before the step that admits its request, which waits
      for the copy (S-LoRA's scripts).
    upload_pages_per_step: pages of adapters that start their copy to the device beside one step; twice as many may be
      on their way, so `2 * upload_pages_per_step` pages of device memory are taken up beside the pool.
    max_rank: largest rank accepted of one projection (1 to 256); bounds a device table, reserves nothing else.
    host_adapter_bytes: budget of the host store; beyond it adapters spill to `spill_dir`. Adapters on their way to the
      device (about `prefetch`) stay in memory beside it.
    spill_dir: where spilled adapters go; None: a temporary directory, removed at the end.
    seed: of the random streams of requests that bring none.
    decode_buckets, mixed_buckets: rows of the compiled step programs: for steps in which every sequence decodes one
      token, and for steps with prefill; None: chosen from max_seqs and max_tokens_per_step.
    kernels: "auto" (what the plan tables name for the device), "xla", "triton" or "mosaic_gpu", of LoRA and attention
      (without a GPU, the last two run by their interpreters: slow, for study and tests).
    tp: devices that the model, the pool and the adapters are cut over (`parallel.layout`); 1: no collectives at all. Of
      several processes (`join_processes`), all devices together.
    tp_lora: how adapters are cut: "slora" (the paper's), "replicated" (A of q,k,v,gate,up and B of o,down on every
      device; LoRA sends nothing) or "sharded_in" (A of all by input).
    tp_first_device: the first of the `tp` devices, which follow one another in `jax.devices()`: several engines can
      each have a group (data parallelism).
    lora: how adapters are served. "paged": gathered from the unified pool, any mix of them in a step. The others are
      baselines of the paper's evaluation. "bmm": by batched products over zero-padded weights and rows
      (`pallas_kernels.lora.bmm`). "merge": merged into the base weights, one adapter at a time (`engine.merge`), under
      the policy `OneAdapter`. "off": requests name adapters, but the base model answers; nothing is loaded or computed.
    compile_ahead: True compiles every program before the first request, so that none is compiled while requests wait.
      False compiles each when it is first used: for a process that answers a request or two.
    keep_logits: outputs carry each generated token's float32 logits (for research; costs a copy of [seqs, vocab]).
    compilation_cache_dir: directory of compiled programs: JAX's persistent compilation cache, and on a CPU the engine's
      own (`engine.program_cache`) in `programs/`. It must be writable by your account only: entries can run code. A
      cache that JAX is configured with already is left alone. None: none.
    model_cache_dir: Orbax cache of converted weights; None: none. Several processes do without: each reads its own part
      of the checkpoint.
    progress: progress bars on stderr for loading and compiling.
    """

    dtype: str = "auto"
    num_pages: int | None = None
    memory_fraction: float = 0.9
    page_size: int = 16
    max_seqs: int = 64
    max_tokens_per_step: int = 256
    max_model_len: int | None = None
    admission: str = "optimistic"
    adapter_pages: int | None = None
    prefix_cache: bool = True
    adapter_slots: int | None = None
    prefetch: int = 8
    upload_pages_per_step: int = 32
    max_rank: int = 256
    host_adapter_bytes: int = 8 << 30
    spill_dir: str | Path | None = None
    seed: int = 0
    decode_buckets: tuple[int, ...] | None = None
    mixed_buckets: tuple[int, ...] | None = None
    kernels: str = "auto"
    tp: int = 1
    tp_lora: LoraSharding = "slora"
    tp_first_device: int = 0
    lora: str = "paged"
    compile_ahead: bool = True
    keep_logits: bool = False
    compilation_cache_dir: str | Path | None = DEFAULT_COMPILATION_CACHE
    model_cache_dir: str | Path | None = None
    progress: bool = True

    def __post_init__(self) -> None:
        _require(self.dtype in DTYPES, "dtype", self.dtype, f"one of {DTYPES}")
        _require(self.page_size in (8, 16, 32), "page_size", self.page_size, "8, 16 or 32")
        _require(_is_int(self.prefetch) and self.prefetch >= 0, "prefetch", self.prefetch, "an integer >= 0")
        for name in ("max_seqs", "max_tokens_per_step", "host_adapter_bytes", "upload_pages_per_step", "tp"):
            value = getattr(self, name)
            _require(_is_int(value) and value >= 1, name, value, "a positive integer")
        for name in ("num_pages", "max_model_len", "adapter_slots", "adapter_pages"):
            value = getattr(self, name)
            low = 1 if name.startswith("adapter") else 2
            _require(value is None or (_is_int(value) and value >= low), name, value, f"None or an integer >= {low}")
        _require(_is_int(self.max_rank) and 1 <= self.max_rank <= 256, "max_rank", self.max_rank, "in 1..256")
        _require(_is_int(self.seed) and 0 <= self.seed < 2**32, "seed", self.seed, "in [0, 2**32)")
        if self.kernels != "auto":
            from pallas_kernels.paged_attention.api import IMPLEMENTATIONS  # imports JAX

            known = self.kernels in IMPLEMENTATIONS
            _require(known, "kernels", self.kernels, f"'auto' or one of {IMPLEMENTATIONS}")
        first = self.tp_first_device
        _require(
            _is_int(first) and (first == 0 or (first > 0 and self.tp > 1)),
            "tp_first_device",
            first,
            "0, or with tp > 1 a positive integer",
        )
        _require(self.tp_lora in LORA_SHARDINGS, "tp_lora", self.tp_lora, f"one of {LORA_SHARDINGS}")
        for name in ("prefix_cache", "compile_ahead", "keep_logits", "progress"):
            _require(isinstance(getattr(self, name), bool), name, getattr(self, name), "True or False")
        for name in ("spill_dir", "compilation_cache_dir", "model_cache_dir"):
            value = getattr(self, name)
            _require(isinstance(value, str | Path | None), name, value, "None or a directory")
        _require(self.lora in LORA, "lora", self.lora, f"one of {LORA}")
        _require(
            self.tp == 1 or self.lora in ("paged", "off"),
            "lora",
            self.lora,
            "'paged' or 'off' over several devices (tp)",
        )
        _require(self.admission in ADMISSIONS, "admission", self.admission, f"one of {ADMISSIONS}")
        fraction = self.memory_fraction
        _require(isinstance(fraction, float) and 0 < fraction <= 1, "memory_fraction", fraction, "a float in (0, 1]")
        _require(
            self.max_tokens_per_step >= self.max_seqs,
            "max_tokens_per_step",
            self.max_tokens_per_step,
            f"at least max_seqs={self.max_seqs}, so that every running sequence gets its token",
        )
        for name, largest, of in (
            ("decode_buckets", self.max_seqs, "max_seqs"),
            ("mixed_buckets", self.max_tokens_per_step, "max_tokens_per_step"),
        ):
            value = getattr(self, name)
            ok = value is None or (
                isinstance(value, tuple | list)
                and all(_is_int(n) and n >= 1 for n in value)
                and max(value, default=0) == largest
            )
            _require(ok, name, value, f"None or positive integers, the largest equal to {of}={largest}")

    def with_dtype(self) -> EngineConfig:
        """Decides "auto". JAX must be free to look for devices (`join_processes` comes first)."""
        if self.dtype != "auto":
            return self
        import jax

        return replace(self, dtype="float32" if jax.default_backend() == "cpu" else "bfloat16")

    def buckets(self) -> tuple[Bucket, ...]:
        """The step programs' shapes: decode programs, smallest first, then mixed ones, smallest first."""
        decode = self.decode_buckets or {min(n, self.max_seqs) for n in (8, 32, self.max_seqs)}
        most = self.max_tokens_per_step
        mixed = self.mixed_buckets or {max(1, min(4 * self.max_seqs, most // 4)), most}
        return (
            *(Bucket(tokens=n, seqs=n, decode=True) for n in sorted(decode)),
            *(Bucket(tokens=n, seqs=min(n, self.max_seqs), decode=False) for n in sorted(mixed)),
        )


def _is_int(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _require(condition: bool, field: str, value: Any, allowed: str) -> None:
    if not condition:
        raise ConfigError(f"EngineConfig.{field}={value!r}: must be {allowed}")
