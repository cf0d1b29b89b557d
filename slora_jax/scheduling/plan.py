"""The plan of one step."""

from __future__ import annotations

from dataclasses import dataclass, field

from slora_jax.memory import PrefixNode, Resident, Upload
from slora_jax.scheduling.request import Request

NOT_FINITE = -1
"""Token id reported for a sequence whose logits are not finite."""


@dataclass(slots=True)
class ScheduledSequence:
    """Tokens `start .. start + count` of a request.

    If they include its last known token, the step samples the next one (`samples`). If `start < request.num_scored`,
    every token needs logits and is a sequence of one token in the step's batch.
    """

    request: Request
    start: int
    count: int
    samples: bool

    @property
    def adapter_slot(self) -> int:
        """Row of the adapter table that the tokens use; -1 for none."""
        return -1 if self.start < self.request.adapter_start else self.request.adapter_slot


@dataclass
class StepPlan:
    """The work of one step.

    Attributes:
      sequences: tokens to compute.
      loads: adapters to upload before the step; empty with prefetch.
      uploads: adapter pages to upload during the step; empty without prefetch. `AdapterResidency.landed` ends each.
      num_tokens: tokens of `sequences`.
      extra: sequences of the batch beyond `len(sequences)`: one for each scored token after a chunk's first.
      preempted: number of preempted requests.
      aborted: requests that the policy aborted, with the reason.
      hits: requests admitted with prefix-cache pages that the device's page table does not hold yet.
      registered: additions to the prefix cache: a request's deepest new node, and the number of pages before its first
        new node.
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
