"""Adapters on their way: from disk to host memory, and from there to the device, each on a lane of its own."""

from __future__ import annotations

import math
from collections import OrderedDict, deque
from collections.abc import Iterable, Mapping

from slora_jax.memory import Resident, Upload
from slora_jax.scheduling import AdapterState
from slora_jax.simulation.cost import CostModel


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
        """Returns whether it is in memory; its reading begins now if it is not."""
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
    """The copies of a plan: those of `StepPlan.loads`, for which the step waits, and those of `StepPlan.uploads`, which
    run beside the steps. All take turns on one lane."""

    def __init__(self, store: HostStore, cost: CostModel, nbytes: Mapping[str, int]) -> None:
        self.store = store
        self.copies = Lane()
        self.nbytes = nbytes
        self._cost = cost
        self._staged: deque[tuple[float, Upload]] = deque()  # by arrival

    def state(self, digest: str, now: float) -> AdapterState:
        """The scheduler's question about an adapter that is not in the pool."""
        return AdapterState.READY if self.store.ready(digest, now) else AdapterState.LOADING

    def load(self, loads: Iterable[Resident], now: float) -> float:
        """When a step dispatched now has its adapters."""
        for resident in loads:
            now = max(now, self.copies.take(now, self._cost.copy_seconds(self.nbytes[resident.digest])))
        return now

    @property
    def pages_in_flight(self) -> int:
        """Pages of uploads that `landed` has not returned."""
        return sum(upload.count for _, upload in self._staged)

    def stage(self, upload: Upload, now: float) -> None:
        """Begins a copy beside the steps."""
        self._staged.append((self.copies.take(now, self._cost.copy_seconds(self._bytes(upload))), upload))

    def landed(self, now: float) -> list[Upload]:
        """Uploads that have arrived since the last question."""
        arrived = []
        while self._staged and self._staged[0][0] <= now:
            arrived.append(self._staged.popleft()[1])
        return arrived

    def bytes_in_flight(self, now: float) -> float:
        """Of uploads that have not arrived."""
        return sum(self._bytes(upload) for arrival, upload in self._staged if arrival > now)

    def next_landing(self, now: float) -> float:
        """When the next upload arrives; infinity if none is under way."""
        return next((arrival for arrival, _ in self._staged if arrival > now), math.inf)

    def next_event(self, now: float) -> float:
        """When the state of an adapter will next change by itself; infinity for never."""
        return min(self.next_landing(now), self.store.next_arrival(now))

    def _bytes(self, upload: Upload) -> float:
        resident = upload.resident
        return self.nbytes[resident.digest] * upload.count / resident.num_pages
