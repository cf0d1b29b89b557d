"""Simulated adapter transfers: reads from disk to host memory, and copies to the device, each on its own lane."""

from __future__ import annotations

import math
from collections import OrderedDict, deque
from collections.abc import Iterable, Mapping

from slora_jax.memory import Resident, Upload
from slora_jax.scheduling import AdapterState
from slora_jax.simulation.cost import CostModel


class Lane:
    """A resource that executes one task at a time, in order of submission."""

    def __init__(self) -> None:
        self.free = 0.0  # time at which all submitted tasks are done
        self.busy = 0.0  # seconds in total

    def take(self, now: float, seconds: float) -> float:
        """Submits a task at `now` and returns the time of its end."""
        self.free = max(self.free, now) + seconds
        self.busy += seconds
        return self.free


class HostStore:
    """Adapters in host memory within a budget; the least recently used others are on disk."""

    def __init__(self, nbytes: Mapping[str, int], budget: int | None, disk_bandwidth: float) -> None:
        """Registers the adapters in order, so the last ones are in memory.

        Args:
          nbytes: size of each adapter, by digest.
          budget: bytes; None: all adapters are in memory.
          disk_bandwidth: bytes per second.
        """
        self._nbytes = nbytes
        self._budget = budget
        self._bandwidth = disk_bandwidth
        self._resident: OrderedDict[str, None] = OrderedDict()
        self._used = 0
        self._reading: dict[str, float] = {}  # digest -> end of its read
        self.disk = Lane()
        self.reads = 0
        if budget is not None:
            for digest in nbytes:
                self._insert(digest)

    def ready(self, digest: str, now: float) -> bool:
        """Returns whether the adapter is in memory; otherwise starts its read from disk."""
        if self._budget is None:
            return True
        if digest in self._resident:
            self._resident.move_to_end(digest)
            return True
        if digest not in self._reading:
            self._reading[digest] = self.disk.take(now, self._nbytes[digest] / self._bandwidth)
            self.reads += 1
        if self._reading[digest] > now:
            return False
        del self._reading[digest]
        self._insert(digest)
        return True

    def next_arrival(self, now: float) -> float:
        """End of the next read; infinity if none is in progress."""
        return min((time for time in self._reading.values() if time > now), default=math.inf)

    def _insert(self, digest: str) -> None:
        """Inserts an adapter and spills others; keeps the new one even if it alone exceeds the budget."""
        self._resident[digest] = None
        self._used += self._nbytes[digest]
        while self._budget is not None and self._used > self._budget and len(self._resident) > 1:
            spilled, _ = self._resident.popitem(last=False)
            self._used -= self._nbytes[spilled]


class Loading:
    """Copies to the device, on one lane: `StepPlan.loads`, which the step waits for, and `StepPlan.uploads`, which
    overlap with steps."""

    def __init__(self, store: HostStore, cost: CostModel, nbytes: Mapping[str, int]) -> None:
        self.store = store
        self.copies = Lane()
        self.nbytes = nbytes
        self._cost = cost
        self._staged: deque[tuple[float, Upload]] = deque()  # by arrival

    def state(self, digest: str, now: float) -> AdapterState:
        """State of an adapter that is not in the pool; starts its read from disk if needed."""
        return AdapterState.READY if self.store.ready(digest, now) else AdapterState.LOADING

    def load(self, loads: Iterable[Resident], now: float) -> float:
        """Starts the copies of a step dispatched at `now` and returns the time of their end."""
        for resident in loads:
            now = max(now, self.copies.take(now, self._cost.copy_seconds(self.nbytes[resident.digest])))
        return now

    @property
    def pages_in_flight(self) -> int:
        """Pages of uploads that `landed` has not returned."""
        return sum(upload.count for _, upload in self._staged)

    def stage(self, upload: Upload, now: float) -> None:
        """Starts a copy that overlaps with steps."""
        self._staged.append((self.copies.take(now, self._cost.copy_seconds(self._bytes(upload))), upload))

    def landed(self, now: float) -> list[Upload]:
        """Returns the uploads that have completed since the last call."""
        arrived = []
        while self._staged and self._staged[0][0] <= now:
            arrived.append(self._staged.popleft()[1])
        return arrived

    def bytes_in_flight(self, now: float) -> float:
        """Bytes of uploads that have not completed."""
        return sum(self._bytes(upload) for arrival, upload in self._staged if arrival > now)

    def next_landing(self, now: float) -> float:
        """End of the next upload; infinity if none is in flight."""
        return next((arrival for arrival, _ in self._staged if arrival > now), math.inf)

    def next_event(self, now: float) -> float:
        """End of the next upload or disk read; infinity if there is none."""
        return min(self.next_landing(now), self.store.next_arrival(now))

    def _bytes(self, upload: Upload) -> float:
        resident = upload.resident
        return self.nbytes[resident.digest] * upload.count / resident.num_pages
