"""Prefetch: uploads the adapters of waiting requests while other requests run."""

from __future__ import annotations

from collections.abc import Container, Iterable
from dataclasses import dataclass
from enum import Enum
from itertools import islice
from typing import Protocol

from slora_jax.memory import AdapterResidency, PageKind
from slora_jax.scheduling.request import Request

REQUESTS_PER_ADAPTER = 4
"""Waiting requests examined per adapter that may be prefetched."""


class AdapterState(Enum):
    """State of an adapter's tiles in host memory."""

    READY = "ready"
    LOADING = "loading"
    """Being read from disk."""
    FAILED = "failed"
    """Could not be read from disk."""


class AdapterSource(Protocol):
    """The executor's interface to adapters, as the scheduler uses it."""

    @property
    def pages_in_flight(self) -> int:
        """Number of pages whose copy to the device has started and has not landed."""

    def adapter_state(self, digest: str) -> AdapterState:
        """Returns the state of an adapter's tiles. Starts the read if they are on disk."""


@dataclass(frozen=True)
class Prefetch:
    """Prefetches adapters for the waiting queue, in the policy's order.

    Attributes:
      adapters: maximum number of prefetched adapters that are in the pool (or being read from disk) and not used yet.
        The limit ensures that prefetched adapters are used before more are prefetched, even if the queue's order
        changes.
      page_size: tokens per page.
    """

    residency: AdapterResidency
    adapters: int
    page_size: int
    source: AdapterSource

    def on_host(self, digest: str | None, absent: set[str]) -> bool:
        """Returns whether an adapter is in the pool or in host memory. Adds its digest to `absent` if not."""
        if digest is None or digest in self.residency:
            return True
        if digest not in absent and self.source.adapter_state(digest) is AdapterState.READY:
            return True
        absent.add(digest)
        return False

    def has_landed(self, digest: str | None) -> bool:
        """Returns whether requests for an adapter can start."""
        resident = None if digest is None else self.residency.find(digest)
        return digest is None or (resident is not None and resident.has_landed)

    def upload_for(self, request: Request, position: int, kv_pages: int, overtakes: bool, slots: int) -> bool:
        """Prefetches the adapter of a waiting request at the head of the queue, if it is absent.

        The queue's order may change with every arrival, and each new first request could evict the adapter prefetched
        for the one before. Therefore at most `slots` adapters are in flight, and prefetched adapters are protected
        until they are used.

        Args:
          position: position of the request in the queue, from 1, not counting admitted requests.
          kv_pages: pages to leave for this request and others.
          overtakes: whether a request ahead also waits for its adapter.
          slots: free sequence slots.

        Returns:
          Whether requests behind this one may be admitted before it. False if the pool has no room for the request and
          its adapter while no prefetched adapter is unused, or if the adapter was evicted before use.
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
        """Prefetches the absent adapters of the next waiting requests and protects those already in the pool.

        Uses only free pages and idle pages that are not awaited. Leaves one page per running sequence, and the KV pages
        of the waiting requests up to and including the adapter's own. Stops at the first request without room, so that
        a smaller one behind it cannot take its pages.

        Args:
          upcoming: waiting requests, the next to be admitted first.
          wanted: digests that any waiting request needs.
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
