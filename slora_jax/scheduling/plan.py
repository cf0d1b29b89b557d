"""What a step computes."""

from __future__ import annotations

from dataclasses import dataclass, field

from slora_jax.memory import Resident
from slora_jax.scheduling.request import Request


@dataclass(slots=True)
class ScheduledSequence:
    """`count` tokens of a request from position `start` on. `samples`: its last known token is among them, so the next
    one is sampled."""

    request: Request
    start: int
    count: int
    samples: bool


@dataclass
class StepPlan:
    """What one step computes, the adapters to upload before it, and the requests given up, each with the reason."""

    sequences: list[ScheduledSequence] = field(default_factory=list)
    loads: list[Resident] = field(default_factory=list)
    num_tokens: int = 0
    preempted: int = 0
    aborted: list[tuple[Request, str]] = field(default_factory=list)
