"""Adapter clustering: few adapters in a batch (S-LoRA's `--batch-num-adapters`)."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from heapq import merge

from slora_jax.scheduling.policy import Batch, Policy
from slora_jax.scheduling.queue import RequestQueue, by_number
from slora_jax.scheduling.request import Request
from slora_jax.typed import Count, check_fields


@dataclass
class Clustering(Policy):
    """First come, first served, but once the batch has `max_adapters_in_batch` adapters, requests of these go first.

    hard=False, as in the code (`ClusterReqQueue`): what the batch holds before the step's admissions decides, and what
    room is left goes to the others in order of arrival, so the number is exceeded rather than capacity left idle.
    hard=True: the batch never has more adapters than that. Others wait for an adapter to leave; while requests for
    those in the batch keep coming, they wait without bound, so wrap it in `Ageing`.

    Requests for the base model use no adapter and count as clustered. Their order of arrival holds among the clustered.
    """

    max_adapters_in_batch: Count
    hard: bool = False

    def __post_init__(self) -> None:
        check_fields(self)

    def select(self, waiting: RequestQueue, batch: Batch, now: float) -> Iterator[Request]:
        if self.hard:
            for request in waiting:
                if len(batch.adapters) >= self.max_adapters_in_batch:
                    yield from _clustered(waiting, batch)
                    return
                yield request
        elif len(batch.adapters) >= self.max_adapters_in_batch:
            yield from _clustered(waiting, batch)
            yield from waiting
        else:
            yield from waiting

    def upcoming(self, waiting: RequestQueue, batch: Batch, now: float) -> Iterator[Request]:
        """Those that a full batch holds back come when an adapter leaves it."""
        yield from self.select(waiting, batch, now)
        if self.hard:
            yield from waiting


def _clustered(waiting: RequestQueue, batch: Batch) -> Iterable[Request]:
    """Waiting requests for the adapters of the batch and for the base model, in order of arrival."""
    groups = [waiting.by_adapter.get(digest, ()) for digest in (*batch.adapters, None)]
    return merge(*groups, key=by_number)
