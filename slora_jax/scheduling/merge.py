"""One adapter at a time: the policy of the baseline that merges adapters into the base weights."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from slora_jax.scheduling.policy import Batch, Policy
from slora_jax.scheduling.queue import RequestQueue
from slora_jax.scheduling.request import Request
from slora_jax.typed import Natural, check_fields


@dataclass
class OneAdapter(Policy):
    """Batches requests of one adapter only, first come, first served among them. The base model counts as an adapter.

    The policy of S-LoRA's merge baseline (paper figure 9; `PEFTReqQueue`, `--scheduler peft`). The batch changes its
    adapter only when it is empty, to the adapter of the oldest waiting request.

    Attributes:
      max_overtaken: admission stops, so that the batch drains, while more than this many waiting requests for other
        adapters arrived before the first one for the batch's adapter.
    """

    max_overtaken: Natural = 30

    def __post_init__(self) -> None:
        check_fields(self)

    def select(self, waiting: RequestQueue, batch: Batch, now: float) -> Iterable[Request]:
        if not waiting:
            return ()
        digest = (batch.running or waiting)[0].digest
        for overtaken, request in enumerate(waiting):
            if request.digest == digest:
                return waiting.by_adapter[digest]
            if overtaken >= self.max_overtaken:
                break
        return ()
