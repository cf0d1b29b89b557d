"""A request and its progress: the host's whole knowledge of one sequence."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import StrEnum
from functools import cached_property

import numpy as np

from slora_jax.memory import PrefixNode
from slora_jax.metrics import FinishReason
from slora_jax.scheduling.sampling_params import SamplingParams


class Status(StrEnum):
    """Which queue a request is in."""

    WAITING = "waiting"
    RUNNING = "running"
    FINISHED = "finished"


@dataclass(frozen=True)
class AdapterUse:
    """The adapter of a request, fixed on arrival: reloading its name later does not touch requests under way."""

    name: str
    digest: str
    ranks: np.ndarray  # int32 [7]
    num_pages: int

    @cached_property
    def rows(self) -> int:
        """Sum of the ranks: what a token of this adapter costs, up to a factor."""
        return int(self.ranks.sum())


@dataclass
class RequestMetrics:
    """Seconds on the engine's clock. `first_token` and `finished` are None until then. cached_tokens: of the prompt,
    how many the prefix cache held when the request was first admitted."""

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

    `output` holds the tokens that the host has read; `num_sampled` counts those that the device has sampled or is
    sampling, so it is ahead of `output` by the steps in flight. `num_computed` tokens have (or, once the dispatched
    steps ran, will have) their keys and values in `pages`, the first of which, as many as `prefix` is deep, are the
    prefix cache's and may be shared; the others are the request's own.

    Attributes:
      number: order of arrival.
      max_new: most tokens to generate.
      stop_token_ids: tokens that end it.
      tenant: charged for it under fair share: by default the name of its adapter, "" for the base model.
      token_times: when the host had each token of `output`, on the engine's clock.
      slot, adapter_slot: while running, its rows of the device's sequence state and adapter table; else -1.
      prefix: the deepest node that it holds while running.
    """

    id: str
    number: int
    prompt: list[int]
    params: SamplingParams
    seed: int
    max_new: int
    adapter: AdapterUse | None
    metrics: RequestMetrics
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
    _token_bytes: bytes = field(default=b"", init=False, repr=False)

    def __post_init__(self) -> None:
        if not self.tenant and self.adapter is not None:
            self.tenant = self.adapter.name

    @property
    def digest(self) -> str | None:
        """Its adapter's content, None for the base model."""
        return None if self.adapter is None else self.adapter.digest

    @property
    def num_tokens(self) -> int:
        """Tokens whose identity is settled, on the host or on the device."""
        return len(self.prompt) + self.num_sampled

    @property
    def in_flight(self) -> int:
        """Sampled tokens that the host has not read yet."""
        return self.num_sampled - len(self.output)

    @property
    def all_sampled(self) -> bool:
        """Returns whether the last token that it may have is sampled or being sampled."""
        return self.num_sampled >= self.max_new

    @property
    def num_scored(self) -> int:
        """How many tokens of the prompt, from the first on, are to give the log-probability of the one that follows."""
        return 0 if self.params.prompt_logprobs is None else len(self.prompt) - 1

    @property
    def num_shared(self) -> int:
        """How many of its pages, from the first on, are the prefix cache's."""
        return 0 if self.prefix is None else self.prefix.depth

    def token_bytes(self) -> bytes:
        """Ids of all tokens that the host knows, of prompt and output, int32."""
        done, known = len(self._token_bytes) // 4, len(self.prompt) + len(self.output)
        if done < known:
            self._token_bytes += np.array(self.tokens(done, known - done), np.int32).tobytes()
        return self._token_bytes

    def tokens(self, start: int, count: int) -> list[int]:
        """Known token ids at positions `start .. start + count` of prompt and output."""
        prompt = len(self.prompt)
        if start >= prompt:
            return self.output[start - prompt : start - prompt + count]
        return self.prompt[start : start + count] + self.output[: max(0, start + count - prompt)]
