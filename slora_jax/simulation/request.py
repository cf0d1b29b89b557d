"""What goes into a simulation and what comes out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from slora_jax.metrics import Counters, PoolSample, RequestRecord


@dataclass(frozen=True)
class SimulatedRequest:
    """A request of the workload. arrival: seconds from the start, at least 0. adapter: index into the simulation's
    adapters, None for the base model. It always generates `output_tokens`. tenant: who is charged under fair share; ""
    is its adapter. prefix: (text, length) of a beginning that is the same in all prompts that name this text, a number
    from 0; only a prefix cache minds it. Of two lengths, the shorter one is shared. after: for a closed loop, the
    number of an earlier request; this one arrives `arrival` seconds after that one ended, answered or aborted."""

    arrival: float
    adapter: int | None
    prompt_tokens: int
    output_tokens: int
    tenant: str = ""
    prefix: tuple[int, int] | None = None
    after: int | None = None

    def prompt(self, number: int) -> list[int]:
        """Token ids: of the shared beginning, then, to its end, of request `number` alone."""
        text, length = (0, 0) if self.prefix is None else self.prefix
        return [-1 - text] * length + [number] * (self.prompt_tokens - length)


@dataclass(frozen=True)
class SimulationResult:
    """records: one per request, in the order of the workload; ids are "0", "1", ...; adapters' names are their indices
    as text. Requests that the policy gave up have `FinishReason.ABORT`. pool: samples at regular times, of all replicas
    together. seconds: when the last request ended, from the start."""

    records: Sequence[RequestRecord]
    pool: Sequence[PoolSample]
    counters: Counters
    seconds: float
    abort_reasons: dict[str, str] = field(default_factory=dict)
