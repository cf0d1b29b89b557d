"""Prefetch: the adapters that the waiting queue will want are uploaded while other requests run."""

from __future__ import annotations

from collections.abc import Container, Iterable
from dataclasses import dataclass
from enum import Enum
from itertools import islice
from typing import Protocol

from slora_jax.memory import AdapterResidency, PageKind
from slora_jax.scheduling.request import Request

REQUESTS_PER_ADAPTER = 4
"""Waiting requests to look at, for each adapter that may be prefetched."""


class AdapterState(Enum):
    """Place of an adapter's tiles on the host."""

    READY = "ready"
    LOADING = "loading"
    FAILED = "failed"


class AdapterSource(Protocol):
    """The executor's side of adapters, as the scheduler sees it."""

    @property
    def pages_in_flight(self) -> int:
        """Pages whose copy to the device has begun and has not landed."""

    def adapter_state(self, digest: str) -> AdapterState:
        """Returns where an adapter's tiles are. Starts the read of those on disk."""


@dataclass(frozen=True)
class Prefetch:
    """Looks ahead along the waiting queue, in the policy's order.

    Attributes:
      adapters: most prefetched adapters that are in the pool (or being read from disk) and not used yet. So however
        long the queue, and however its order changes, what was prefetched is used before more is.
    """

    residency: AdapterResidency
    adapters: int
    page_size: int
    source: AdapterSource

    def on_host(self, digest: str | None, absent: set[str]) -> bool:
        """Returns whether an adapter is in the pool or in host memory. `absent` collects those that are not."""
        if digest is None or digest in self.residency:
            return True
        if digest not in absent and self.source.adapter_state(digest) is AdapterState.READY:
            return True
        absent.add(digest)
        return False

    def has_landed(self, digest: str | None) -> bool:
        """Returns whether requests of an adapter can start."""
        resident = None if digest is None else self.residency.find(digest)
        return digest is None or (resident is not None and resident.has_landed)

    def upload_for(self, request: Request, position: int, kv_pages: int, overtakes: bool, slots: int) -> bool:
        """Prefetches the adapter of the `position`th waiting request, if it is absent. Returns whether others may go
        ahead meanwhile: not if there is no room for request and adapter, nor if this adapter was evicted before use.

        The order may change with every arrival, so that each new first request could prefetch another adapter for the
        same slot and evict the one before. So no more are in flight than there are free `slots` for requests, and those
        that were prefetched are used first.

        Args:
          kv_pages: to leave for the request and for others.
          overtakes: whether the adapters of requests ahead have not landed either.
        """
        use, residency = request.adapter, self.residency
        assert use is not None
        resident = residency.find(use.digest)
        if resident is None:
            if len(residency.arriving) >= slots:
                return True
            protect = overtakes or residency.num_unused > 0
            if not residency.can_acquire(use.digest, protect) or not (
                residency.evictor.can_make_room(kv_pages, use.num_pages, protect)
            ):
                return residency.num_unused > 0
            resident = residency.prefetch(use.digest, use.ranks, use.num_pages, position, protect)
        resident.kept_waiting |= position <= slots
        return use.digest not in residency.evicted_before_use

    def look_ahead(self, upcoming: Iterable[Request], wanted: Container[str | None], running: int) -> None:
        """Prefetches the next adapters that are absent, and protects those that are in the pool.

        They take pages that are free, or idle and not wanted near the head of the queue. A page for each of the
        `running` sequences is left, and what the waiting requests up to the adapter's own need for their tokens: a full
        pool takes no prefetched adapters. The first request that has no room ends it, as a smaller one behind it must
        not take what it waits for.

        Args:
          upcoming: waiting requests, the next to be admitted first.
          wanted: digests that any waiting request wants.
          running: number of running sequences.
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
        room = evictor.available(PageKind.ADAPTER, protect_awaited=True) - (running if shared else 0)
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
            if left < 0 or room < 0 or not residency.can_acquire(use.digest, protect_awaited=True):
                return
            if self.source.adapter_state(use.digest) is AdapterState.READY:
                residency.prefetch(use.digest, use.ranks, use.num_pages, positions[use.digest], protect_awaited=True)
            else:
                loading.add(use.digest)
