"""A recording of an engine at work, for the Chrome trace viewer or Perfetto, and for `slora_jax.metrics`.

Tracks of complete events: the host's steps (schedule, dispatch, read), adapters' uploads from the begin of their copy
until their last page is in the pool, device steps from dispatch until their tokens are read, and disk reads and writes
by thread. Counter tracks: queues, pages by kind, bytes on their way to the device.
"""

from __future__ import annotations

import itertools
import json
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from slora_jax.memory import Resident, Upload, pool_pages
from slora_jax.metrics import PoolSample, PoolStay
from slora_jax.scheduling import AdapterSource, Scheduler, StepPlan

HOST, UPLOADS, DEVICE = "host", "adapter uploads", ("device, even steps", "device, odd steps")
"""Names of tracks. At most two steps are in flight, the newer one dispatched before the older is read: two tracks."""


@dataclass
class _Copy:
    """The upload of an adapter. lane: the lowest that no other copy has. steps: the numbers of those before which some
    of its pages landed."""

    resident: Resident
    adapter: str
    lane: int
    start: float
    steps: list[int] = field(default_factory=list)


class NoTrace:
    """Records nothing, and allocates nothing: what an engine has unless it is traced."""

    _NOTHING = nullcontext()

    def step(self) -> AbstractContextManager[None]:
        """Spans one step of the core; ends with a sample of queues and pool."""
        return self._NOTHING

    def span(self, name: str) -> AbstractContextManager[None]:
        """Spans a part of the host's step."""
        return self._NOTHING

    def upload(self, resident: Resident) -> AbstractContextManager[None]:
        """Spans the call that hands an adapter's tiles to the device. The copy itself may run on after it."""
        return self._NOTHING

    def staged(self, upload: Upload) -> None:
        """The copy of some pages of an adapter has begun, beside the steps."""

    def landed(self, upload: Upload) -> None:
        """These pages are in the pool for the next step; or their adapter was evicted meanwhile."""

    def planned(self, plan: StepPlan, scheduler: Scheduler) -> None:
        """Records which adapters the plan gave pages, and which were evicted."""

    def dispatched(self, step: object, plan: StepPlan) -> None:
        """The device has a step from now on."""

    def tokens_read(self, step: object) -> None:
        """A step's tokens are on the host."""


NO_TRACE = NoTrace()


class Trace(NoTrace):
    """Records everything, in memory. Times are seconds of `time.perf_counter`, like
    those of `RequestOutput.metrics`; in the file, microseconds since `start`.

    samples: queues and pool after each step. An adapter's leaving between steps is noticed by the next plan.
    """

    def __init__(
        self, scheduler: Scheduler, adapters: AdapterSource, names: Mapping[str, str], page_bytes: int
    ) -> None:
        """names: of registered adapters, by digest. page_bytes: bytes of a page over all layers."""
        self._scheduler, self._adapters, self._page_bytes = scheduler, adapters, page_bytes
        self.samples: list[PoolSample] = []
        self._events: list[dict[str, Any]] = []
        self._in_flight: dict[int, tuple[float, int, dict[str, int]]] = {}  # by id: dispatched, number, about it
        self._steps = 0
        self._copies: dict[int, _Copy] = {}  # by id of the resident
        self._landed = 0  # adapters since the last dispatch
        self._ended: list[PoolStay] = []
        self._resident = {r.digest: (r, _stay(r, names, None)) for r in scheduler.residency.residents}
        self.start = time.perf_counter()
        self.sample()

    def stays(self) -> list[PoolStay]:
        """Adapters' times in the pool, those that ended first."""
        return self._ended + [stay for _, stay in self._resident.values()]

    @contextmanager
    def step(self) -> Iterator[None]:
        start = time.perf_counter()
        yield
        self.sample()
        self._complete(HOST, "step", start)

    @contextmanager
    def span(self, name: str) -> Iterator[None]:
        start = time.perf_counter()
        yield
        self._complete(HOST, name, start)

    @contextmanager
    def upload(self, resident: Resident) -> Iterator[None]:
        start = time.perf_counter()
        yield
        adapter = self._resident[resident.digest][1].adapter
        pages = resident.num_pages
        self._complete(UPLOADS, adapter, start, bytes=pages * self._page_bytes, pages=pages, slot=resident.slot)

    def staged(self, upload: Upload) -> None:
        resident = upload.resident
        if id(resident) not in self._copies:
            lanes = {copy.lane for copy in self._copies.values()}
            lane = next(n for n in itertools.count() if n not in lanes)
            name = self._resident[resident.digest][1].adapter
            self._copies[id(resident)] = _Copy(resident, name, lane, time.perf_counter())

    def landed(self, upload: Upload) -> None:
        resident = upload.resident
        if id(resident) not in self._copies or not resident.present:  # begun before the recording; or given up
            return
        self._copies[id(resident)].steps.append(self._steps)
        if resident.has_landed:
            self._landed += 1
            self._copied(self._copies.pop(id(resident)))

    def planned(self, plan: StepPlan, scheduler: Scheduler) -> None:
        now = time.perf_counter()
        for key, copy in list(self._copies.items()):
            if not copy.resident.present:
                self._copied(self._copies.pop(key))
        names = {use.digest: use.name for s in plan.sequences if (use := s.request.adapter) is not None}
        residents = {r.digest: r for r in scheduler.residency.residents}
        for digest, (resident, stay) in list(self._resident.items()):
            if residents.get(digest) is not resident:  # gone; or gone and back within one plan
                self._ended.append(PoolStay(stay.adapter, digest, stay.pages, stay.loaded, now))
                del self._resident[digest]
        for digest, resident in residents.items():
            if digest not in self._resident:
                waiting = scheduler.waiting.by_adapter.get(digest)
                if waiting and (use := waiting[0].adapter) is not None:  # prefetched for this one
                    names[digest] = use.name
                self._resident[digest] = (resident, _stay(resident, names, now))

    def dispatched(self, step: object, plan: StepPlan) -> None:
        uploads, self._landed = self._landed + len(plan.loads), 0
        about = {"tokens": plan.num_tokens, "sequences": len(plan.sequences), "uploads": uploads}
        self._in_flight[id(step)] = (time.perf_counter(), self._steps, about)
        self._steps += 1

    def tokens_read(self, step: object) -> None:
        if id(step) in self._in_flight:  # the first one may have been dispatched before the recording began
            start, number, about = self._in_flight.pop(id(step))
            self._complete(DEVICE[number % 2], f"step {number}", start, **about)

    def disk(self, name: str, digest: str, nbytes: int, start: float) -> None:
        """A read or write of `nbytes` from `start` until now by the calling thread. For any thread."""
        self._complete(f"disk: {threading.current_thread().name}", name, start, bytes=nbytes, digest=digest[:12])

    def sample(self) -> None:
        """Records queues and pool as they are now."""
        scheduler = self._scheduler
        self.samples.append(
            PoolSample(
                time.perf_counter(),
                pool_pages(scheduler.residency),
                len(scheduler.running),
                len(scheduler.waiting),
                self._adapters.pages_in_flight * self._page_bytes,
            )
        )

    def events(self) -> list[dict[str, Any]]:
        """Everything so far in the Trace Event Format: names of tracks, then events by time."""
        events = list(self._events)  # the disk's threads may add to them
        tracks = [HOST, UPLOADS, *DEVICE]
        tracks += sorted({event["tid"] for event in events} - set(tracks))
        number = {track: i for i, track in enumerate(tracks)}
        named = [{"name": "process_name", "ph": "M", "pid": 0, "tid": 0, "args": {"name": "slora_jax engine"}}]
        for track, i in number.items():
            named.append({"name": "thread_name", "ph": "M", "pid": 0, "tid": i, "args": {"name": track}})
            named.append({"name": "thread_sort_index", "ph": "M", "pid": 0, "tid": i, "args": {"sort_index": i}})
        timed = [event | {"tid": number[event["tid"]]} for event in events]
        for sample in self.samples:
            queues = {"running": sample.running, "waiting": sample.waiting}
            uploading = {"bytes": sample.uploading}
            for name, values in (
                ("queues (requests)", queues),
                ("pool (pages)", vars(sample.pages)),
                ("uploads in flight (bytes)", uploading),
            ):
                timed.append({"name": name, "ph": "C", "pid": 0, "ts": self._micros(sample.time), "args": values})
        timed.sort(key=lambda event: (event["ts"], -event.get("dur", 0)))
        return named + timed

    def write(self, path: str | Path) -> None:
        """Writes the events as JSON, for chrome://tracing or https://ui.perfetto.dev."""
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps({"traceEvents": self.events(), "displayTimeUnit": "ms"}))

    def _copied(self, copy: _Copy) -> None:
        resident = copy.resident
        self._complete(
            UPLOADS if not copy.lane else f"{UPLOADS} {copy.lane + 1}",
            copy.adapter,
            copy.start,
            bytes=resident.num_pages * self._page_bytes,
            pages=resident.num_pages,
            slot=resident.slot,
            before_steps=copy.steps,
            given_up=not resident.present,
        )

    def _complete(self, track: str, name: str, start: float, **args: object) -> None:
        """One event on a track from `start` (or the recording's) until now."""
        ts = self._micros(max(start, self.start))
        dur = self._micros(time.perf_counter()) - ts
        self._events.append(
            {"name": name, "ph": "X", "pid": 0, "tid": track, "ts": ts, "dur": round(dur, 3), "args": args}
        )

    def _micros(self, seconds: float) -> float:
        return round((seconds - self.start) * 1e6, 3)


def _stay(resident: Resident, names: Mapping[str, str], loaded: float | None) -> PoolStay:
    digest = resident.digest
    return PoolStay(names.get(digest, digest[:12]), digest, resident.pages.size, loaded)
