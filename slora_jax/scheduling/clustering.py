"""Adapter clustering: limits the number of adapters in a batch (S-LoRA's `--batch-num-adapters`)."""

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
    """First come, first served until the batch has `max_adapters_in_batch` adapters; then their requests come first.

    Requests for the base model count as requests for an adapter of the batch.

    Attributes:
      max_adapters_in_batch: limit on the adapters of a batch.
      hard: False, as in S-LoRA's code (`ClusterReqQueue`), compares the limit with the batch before the step's
        admissions, and fills the remaining capacity with other requests in order of arrival, which can exceed the
        limit. True never exceeds it: other requests wait until an adapter leaves the batch. Their wait is unbounded
        while requests for the batch's adapters keep arriving, so wrap the policy in `Ageing`.
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
        """Adds the requests that a full batch holds back: they are admitted when an adapter leaves it."""
        yield from self.select(waiting, batch, now)
        if self.hard:
            yield from waiting


def _clustered(waiting: RequestQueue, batch: Batch) -> Iterable[Request]:
    """Waiting requests for the batch's adapters and for the base model, in order of arrival."""
    groups = [waiting.by_adapter.get(digest, ()) for digest in (*batch.adapters, None)]
    return merge(*groups, key=by_number)
