"""Adapters on their way: from disk to host memory, and from there to the device, each on a lane of its own."""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Iterable, Mapping
from itertools import islice

from slora_jax.memory import Resident
from slora_jax.scheduling import AdapterState, Request
from slora_jax.simulation.cost import CostModel

PREFETCHED = 16
"""Adapters copied ahead at most."""


class Lane:
    """Does one thing at a time, in the order of asking."""

    def __init__(self) -> None:
        self.free = 0.0  # seconds: when what was asked for is done
        self.busy = 0.0

    def take(self, now: float, seconds: float) -> float:
        """When work that is asked for now ends."""
        self.free = max(self.free, now) + seconds
        self.busy += seconds
        return self.free


class HostStore:
    """Adapters in host memory under a budget of bytes, the least recently used on disk (or all in memory)."""

    def __init__(self, nbytes: Mapping[str, int], budget: int | None, disk_bandwidth: float) -> None:
        """nbytes: of each adapter, by digest. They are registered in this order, so the last ones are in memory."""
        self._nbytes = nbytes
        self._budget = budget
        self._bandwidth = disk_bandwidth
        self._here: OrderedDict[str, None] = OrderedDict()
        self._used = 0
        self._coming: dict[str, float] = {}
        self.disk = Lane()
        self.reads = 0
        if budget is not None:
            for digest in nbytes:
                self._put(digest)

    def ready(self, digest: str, now: float) -> bool:
        """Whether it is in memory; its reading begins now if it is not."""
        if self._budget is None:
            return True
        if digest in self._here:
            self._here.move_to_end(digest)
            return True
        if digest not in self._coming:
            self._coming[digest] = self.disk.take(now, self._nbytes[digest] / self._bandwidth)
            self.reads += 1
        if self._coming[digest] > now:
            return False
        del self._coming[digest]
        self._put(digest)
        return True

    def next_arrival(self, now: float) -> float:
        """When the next reading ends; infinity if none is under way."""
        return min((time for time in self._coming.values() if time > now), default=math.inf)

    def _put(self, digest: str) -> None:
        """The newest stays even if it is larger than the budget, as it is wanted at once."""
        self._here[digest] = None
        self._used += self._nbytes[digest]
        while self._budget is not None and self._used > self._budget and len(self._here) > 1:
            gone, _ = self._here.popitem(last=False)
            self._used -= self._nbytes[gone]


class Loading:
    """Loads on admission: a step waits for the copies of the adapters that it admits. And the seam of prefetching."""

    def __init__(self, store: HostStore, cost: CostModel, nbytes: Mapping[str, int]) -> None:
        self.store = store
        self.copies = Lane()
        self._cost = cost
        self._nbytes = nbytes

    def state(self, digest: str, now: float) -> AdapterState:
        """The scheduler's question about an adapter that is not in the pool."""
        return AdapterState.READY if self.store.ready(digest, now) else AdapterState.LOADING

    def ahead(self, waiting: Iterable[Request], now: float) -> None:
        """Copies for waiting requests, the most urgent first."""

    def landed(self, loads: Iterable[Resident], now: float) -> float:
        """When a step planned now has its adapters."""
        for resident in loads:
            now = max(now, self._copy(resident.digest, now))
        return now

    def next_event(self, now: float) -> float:
        """When the state of an adapter will next change by itself; infinity for never."""
        return self.store.next_arrival(now)

    def _copy(self, digest: str, now: float) -> float:
        return self.copies.take(now, self._cost.copy_seconds(self._nbytes[digest]))


class Prefetching(Loading):
    """Copies run ahead for waiting requests; one whose adapter has not landed waits, and others go on. What was copied
    ahead lies in buffers of its own until it is admitted, at most `PREFETCHED` adapters."""

    def __init__(self, store: HostStore, cost: CostModel, nbytes: Mapping[str, int]) -> None:
        super().__init__(store, cost, nbytes)
        self._landing: OrderedDict[str, float] = OrderedDict()  # the one asked for longest ago first
        self._granted: set[str] = set()  # may be admitted in the step that is being planned

    def state(self, digest: str, now: float) -> AdapterState:
        if digest not in self._landing and not self._start(digest, now):
            return AdapterState.LOADING
        if self._landing[digest] > now:
            return AdapterState.LOADING
        self._granted.add(digest)
        return AdapterState.READY

    def ahead(self, waiting: Iterable[Request], now: float) -> None:
        for request in islice(waiting, 4 * PREFETCHED):
            if len(self._landing) >= PREFETCHED:
                return
            if request.digest is not None and request.digest not in self._landing:
                self._start(request.digest, now)

    def landed(self, loads: Iterable[Resident], now: float) -> float:
        for resident in loads:
            del self._landing[resident.digest]
        self._granted.clear()
        return now

    def next_event(self, now: float) -> float:
        copies = min((time for time in self._landing.values() if time > now), default=math.inf)
        return min(copies, super().next_event(now))

    def _start(self, digest: str, now: float) -> bool:
        if not self.store.ready(digest, now):
            return False
        if len(self._landing) >= PREFETCHED:
            unused = next((d for d, t in self._landing.items() if t <= now and d not in self._granted), None)
            if unused is None:
                return False
            del self._landing[unused]  # it lost its turn: copied again when it is wanted
        self._landing[digest] = self._copy(digest, now)
        return True
