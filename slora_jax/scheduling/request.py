"""A request and its progress on the host."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import StrEnum
from functools import cached_property

import numpy as np

from pallas_kernels.lora.layout import RANKS, VECTORS
from slora_jax.memory import PrefixNode
from slora_jax.metrics import FinishReason
from slora_jax.scheduling.sampling_params import SamplingParams
from slora_jax.scheduling.structured import TokenGrammar


class Status(StrEnum):
    """State of a request."""

    WAITING = "waiting"
    RUNNING = "running"
    FINISHED = "finished"


@dataclass(frozen=True)
class AdapterUse:
    """The adapter of a request, fixed on arrival: reloading the name later does not affect the request.

    `digest` is that of its content, `ranks` has the rank of each projection and, of an adapter that is more than plain
    LoRA, the extras (`pallas_kernels.lora.layout`); `num_pages` are the pages that it needs.
    """

    name: str
    digest: str
    ranks: np.ndarray  # int32 [7], [10] or [10 + 3 E]
    num_pages: int

    @cached_property
    def rows(self) -> int:
        """Sum of the ranks, proportional to the LoRA work per token."""
        return int(self.ranks[:VECTORS].sum())

    @cached_property
    def has_extras(self) -> bool:
        """True if steps with this adapter need the program for extras."""
        return bool(self.ranks[VECTORS:].any())

    @cached_property
    def has_experts(self) -> bool:
        """True if steps with this adapter need the program for LoRA on experts."""
        return bool(self.ranks[RANKS:].any())


@dataclass
class RequestMetrics:
    """Times of a request, seconds on the engine's clock, None until the event; `admitted` is the first admission, at
    which `cached_tokens` of the prompt were in the prefix cache."""

    arrival: float
    admitted: float | None = None
    first_token: float | None = None
    finished: float | None = None
    preemptions: int = 0
    cached_tokens: int = 0

    @property
    def first_token_latency(self) -> float | None:
        return None if self.first_token is None else self.first_token - self.arrival

    @property
    def latency(self) -> float | None:
        return None if self.finished is None else self.finished - self.arrival


@dataclass(eq=False, slots=True)
class Request:
    """One sequence.

    Attributes:
      number: order of arrival.
      prompt: token ids.
      max_new: maximum number of tokens to generate.
      adapter_start: position of the first token that the adapter acts on; the KV before it is the base model's. A step
        computes tokens of a request on one side of it only.
      stop_token_ids: tokens that end the request.
      output: token ids that the host has read.
      token_times: time at which the host read each token of `output`, seconds on the engine's clock.
      num_sampled: tokens that the device has sampled or is sampling; ahead of `output` by the steps in flight.
      num_computed: tokens whose KV is in `pages` once the dispatched steps have run.
      slot, adapter_slot: rows of the device's sequence state and adapter table while running; otherwise -1.
      pages: page ids in token order. The first `prefix.depth` belong to the prefix cache and may be shared.
      prefix: deepest prefix-cache node held while running.
      grammar: grammar of its text, or None.
      priority: lower numbers come first under a policy that takes priorities.
      edits_logits: whether its logits are edited before sampling.
      tenant: account charged under fair share: by default the adapter's name, "" for the base model.
    """

    id: str
    number: int
    prompt: list[int]
    params: SamplingParams
    seed: int
    max_new: int
    adapter: AdapterUse | None
    metrics: RequestMetrics
    adapter_start: int = 0
    stop_token_ids: frozenset[int] = frozenset()
    output: list[int] = field(default_factory=list)
    token_times: list[float] = field(default_factory=list)
    status: Status = Status.WAITING
    finish_reason: FinishReason | None = None
    num_sampled: int = 0
    num_computed: int = 0
    slot: int = -1
    adapter_slot: int = -1
    pages: list[int] = field(default_factory=list)
    prefix: PrefixNode | None = None
    tenant: str = ""
    grammar: TokenGrammar | None = None
    priority: int = 0
    edits_logits: bool = field(default=False, init=False)
    _token_bytes: bytes = field(default=b"", init=False, repr=False)

    def __post_init__(self) -> None:
        if not self.tenant and self.adapter is not None:
            self.tenant = self.adapter.name
        self.edits_logits = self.grammar is not None or bool(self.params.logit_bias)

    @property
    def digest(self) -> str | None:
        """Digest of the adapter, None for the base model."""
        return None if self.adapter is None else self.adapter.digest

    @property
    def num_tokens(self) -> int:
        """Number of prompt tokens and sampled tokens."""
        return len(self.prompt) + self.num_sampled

    @property
    def in_flight(self) -> int:
        """Number of sampled tokens that the host has not read yet."""
        return self.num_sampled - len(self.output)

    @property
    def num_scored(self) -> int:
        """Number of leading prompt tokens that need logits, to report the log-probability of the next token."""
        return 0 if self.params.prompt_logprobs is None else len(self.prompt) - 1

    def pools_at(self, position: int) -> bool:
        """Returns whether the hidden states of its tokens from `position` on contribute to its embedding."""
        return self.params.prompt_embedding is not None and position < len(self.prompt) and not self.output

    @property
    def needs_whole_prompt(self) -> bool:
        """True if it needs results for every prompt token, so that it cannot start with cached pages."""
        return self.num_scored > 0 or self.params.prompt_embedding == "mean"

    @property
    def num_shared(self) -> int:
        """Number of leading `pages` that belong to the prefix cache."""
        return 0 if self.prefix is None else self.prefix.depth

    def token_bytes(self) -> bytes:
        """Returns the int32 ids of prompt and output as bytes, the keys of the prefix cache."""
        done, known = len(self._token_bytes) // 4, len(self.prompt) + len(self.output)
        if done < known:
            self._token_bytes += np.array(self.tokens(done, known - done), np.int32).tobytes()
        return self._token_bytes

    def tokens(self, start: int, count: int) -> list[int]:
        """Returns the token ids at positions `start .. start + count` of prompt and output."""
        prompt = len(self.prompt)
        if start >= prompt:
            return self.output[start - prompt : start - prompt + count]
        return self.prompt[start : start + count] + self.output[: max(0, start + count - prompt)]
