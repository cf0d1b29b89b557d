"""What a step computes."""

from __future__ import annotations

from dataclasses import dataclass, field

from slora_jax.memory import PrefixNode, Resident, Upload
from slora_jax.scheduling.request import Request

NOT_FINITE = -1
"""The new token of a sequence whose logits are not finite (NaN or infinity)."""


@dataclass(slots=True)
class ScheduledSequence:
    """`count` tokens of a request from position `start` on. `samples`: its last known token is among them, so the next
    one is sampled. If `start` is below the request's `num_scored`, each of the tokens gives logits: each is a sequence
    of one row in the step's batch."""

    request: Request
    start: int
    count: int
    samples: bool


@dataclass
class StepPlan:
    """The work of one step.

    Attributes:
      sequences: what it computes; num_tokens: their rows.
      loads: adapters to upload before the step. uploads: pages of adapters to copy beside it; each is answered by
        `AdapterResidency.landed`. A plan has the one or the other, by `CoreConfig.prefetch`.
      extra: sequences of the batch beyond `sequences`, as there is one for each scored token.
      preempted: number of requests that lost their pages.
      aborted: requests that the policy ended, each with the reason.
      hits: requests admitted with pages of the prefix cache that the device's page table does not have yet.
      registered: additions to the prefix cache: deepest new node of a request, and pages before the first new one.
    """

    sequences: list[ScheduledSequence] = field(default_factory=list)
    loads: list[Resident] = field(default_factory=list)
    uploads: list[Upload] = field(default_factory=list)
    num_tokens: int = 0
    extra: int = 0
    preempted: int = 0
    aborted: list[tuple[Request, str]] = field(default_factory=list)
    hits: list[Request] = field(default_factory=list)
    registered: list[tuple[PrefixNode, int]] = field(default_factory=list)

    @property
    def num_sequences(self) -> int:
        """Sequences in the step's batch."""
        return len(self.sequences) + self.extra
