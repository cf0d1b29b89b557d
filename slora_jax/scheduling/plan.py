"""What a step computes."""

from __future__ import annotations

from dataclasses import dataclass, field

from slora_jax.memory import Resident, Upload
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
    """What one step computes, and the requests given up, each with the reason.

    loads: adapters to upload before the step. uploads: pages of adapters to copy beside it; each is answered by
    `AdapterResidency.land` when it is there. A plan has the one or the other, by `SchedulerLimits.prefetch`.
    """

    sequences: list[ScheduledSequence] = field(default_factory=list)
    loads: list[Resident] = field(default_factory=list)
    uploads: list[Upload] = field(default_factory=list)
    num_tokens: int = 0
    preempted: int = 0
    aborted: list[tuple[Request, str]] = field(default_factory=list)
