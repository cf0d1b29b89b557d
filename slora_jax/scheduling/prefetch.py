"""Prefetch: the adapters that the waiting queue will want come to the pool while others run."""

from __future__ import annotations

from collections.abc import Callable, Container, Iterable
from dataclasses import dataclass
from enum import Enum
from itertools import islice

from slora_jax.memory import AdapterResidency, PageKind
from slora_jax.scheduling.request import Request

REQUESTS_PER_ADAPTER = 4
"""Waiting requests that are looked at, for each adapter that may be brought ahead."""


class AdapterState(Enum):
    """Where an adapter's tiles are on the host."""

    READY = "ready"
    LOADING = "loading"
    FAILED = "failed"


@dataclass(frozen=True)
class Prefetch:
    """Looks ahead along the waiting queue, in the policy's own order.

    adapters: at most so many are in the pool (or on their way from disk) that were brought ahead and not used yet. So
    however long the queue, and however its order changes, what was brought is used before more comes. adapter_state:
    where an adapter's tiles are; the question starts the read of those on disk.
    """

    residency: AdapterResidency
    adapters: int
    page_size: int
    adapter_state: Callable[[str], AdapterState]

    def look_ahead(self, upcoming: Iterable[Request], wanted: Container[str | None], running: int) -> None:
        """Takes pages for the next adapters that are absent, and protects those that are there.

        Room is made of what is free and what is idle and wanted by nobody near the head of the queue. A page for each
        of the `running` sequences is left, and what the waiting requests up to the adapter's own need for their tokens:
        a pool that is full of keys is no place to bring adapters to. The first request that has no room ends it, as a
        smaller one behind it must not take what it waits for.

        upcoming: waiting requests, the next to be admitted first. wanted: digests that any waiting request wants.
        """
        residency, evictor = self.residency, self.residency.evictor
        requests = list(islice(upcoming, REQUESTS_PER_ADAPTER * self.adapters))
        positions: dict[str, int] = {}
        for request in requests:
            if request.adapter is not None and request.adapter.digest not in positions:
                positions[request.adapter.digest] = len(positions) + 1
        residency.await_only(positions, wanted)
        if all(digest in residency for digest in positions):
            return
        shared = evictor.allocator.shares_room(PageKind.KV, PageKind.ADAPTER)
        room = evictor.within_reach(PageKind.ADAPTER, spare=True) - (running if shared else 0)
        left = self.adapters - residency.num_unused
        loading: set[str] = set()
        for request in requests:
            if shared:
                room -= -(-request.num_tokens // self.page_size)
            use = request.adapter
            if use is None or use.digest in residency or use.digest in loading:
                continue
            left -= 1
            room -= use.num_pages
            if left < 0 or room < 0 or not residency.can_acquire(use.digest, spare=True):
                return
            if self.adapter_state(use.digest) is AdapterState.READY:
                residency.bring(use.digest, use.ranks, use.num_pages, positions[use.digest], spare=True)
            else:
                loading.add(use.digest)
