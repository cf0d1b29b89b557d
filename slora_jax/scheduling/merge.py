"""One adapter at a time: the scheduling rule of the baseline that merges adapters into the base weights."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from slora_jax.scheduling.policy import Batch, Policy
from slora_jax.scheduling.queue import RequestQueue
from slora_jax.scheduling.request import Request
from slora_jax.typed import Natural, check_fields


@dataclass
class OneAdapter(Policy):
    """The batch holds requests of one adapter only (the base model counts as one), first come, first served among them:
    S-LoRA's merge baseline (paper figure 9; `PEFTReqQueue`, `--scheduler peft`).

    The adapter of the batch stays until the batch is empty; then comes that of the request that has waited longest.
    Nobody is admitted, so that the batch drains, while more than `max_overtaken` waiting requests for other adapters
    came before the first one for the batch's own.
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
