"""Input and output of a simulation."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from slora_jax.metrics import Counters, PoolSample, RequestRecord


@dataclass(frozen=True)
class SimulatedRequest:
    """A request of the workload; it always generates `output_tokens`.

    Attributes:
      arrival: seconds from the start or, with `after`, from the end of that request; at least 0.
      adapter: index into the simulation's adapters; None: the base model.
      tenant: account charged under fair share; "": the adapter.
      prefix: (text, length): number of a text, from 0, and how many of its tokens begin the prompt. Only a prefix cache
        uses it; prompts with the same text share the shorter length.
      after: for a closed loop, the number of an earlier request (answered or aborted) that this one follows.
    """

    arrival: float
    adapter: int | None
    prompt_tokens: int
    output_tokens: int
    tenant: str = ""
    prefix: tuple[int, int] | None = None
    after: int | None = None

    def prompt(self, number: int) -> list[int]:
        """Token ids: the shared prefix, then tokens unique to request `number`."""
        text, length = (0, 0) if self.prefix is None else self.prefix
        return [-1 - text] * length + [number] * (self.prompt_tokens - length)


@dataclass(frozen=True)
class SimulationResult:
    """Result of a simulation.

    Attributes:
      records: one per request, in the order of the workload, with ids "0", "1", ... and adapter indices as names.
        Requests aborted by the policy have `FinishReason.ABORT`.
      pool: samples at regular times, summed over replicas.
      seconds: end of the last request, from the start.
      abort_reasons: by request id.
    """

    records: Sequence[RequestRecord]
    pool: Sequence[PoolSample]
    counters: Counters
    seconds: float
    abort_reasons: dict[str, str] = field(default_factory=dict)
