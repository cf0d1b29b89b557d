"""A trace of a running engine, for the Chrome trace viewer or Perfetto, and for `slora_jax.metrics`.

Event tracks: host steps (schedule, dispatch, read), adapter uploads (from the start of the copy until the last page is
in the pool), device steps (from dispatch until the tokens are read), and disk reads and writes by thread. Counter
tracks: queues, pages by kind, bytes in flight to the device.
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
"""Names of tracks. Device steps need two, because a step is dispatched before the previous one is read."""


@dataclass
class _Copy:
    """An adapter upload in progress. `lane` is the lowest free track; `steps` are the numbers of the steps before which
    some of its pages landed."""

    resident: Resident
    adapter: str
    lane: int
    start: float
    steps: list[int] = field(default_factory=list)


class NoTrace:
    """The recorder of an engine that is not traced. Records nothing and allocates nothing."""

    _NOTHING = nullcontext()

    def step(self) -> AbstractContextManager[None]:
        """Spans one step of the core, and samples queues and pool at its end."""
        return self._NOTHING

    def span(self, name: str) -> AbstractContextManager[None]:
        """Spans a part of the host's step."""
        return self._NOTHING

    def upload(self, resident: Resident) -> AbstractContextManager[None]:
        """Spans the call that dispatches an adapter's upload. The copy may continue after it."""
        return self._NOTHING

    def staged(self, upload: Upload) -> None:
        """Records that the copy of some pages of an adapter has started."""

    def landed(self, upload: Upload) -> None:
        """Records that pages are in the pool for the next step, or that their adapter was evicted during the copy."""

    def planned(self, plan: StepPlan, scheduler: Scheduler) -> None:
        """Records which adapters entered the pool with this plan and which were evicted."""

    def dispatched(self, step: object, plan: StepPlan) -> None:
        """Records the dispatch of a step."""

    def tokens_read(self, step: object) -> None:
        """Records that a step's tokens are on the host."""


NO_TRACE = NoTrace()


class Trace(NoTrace):
    """Records all events in memory. An eviction between steps is recorded by the next plan.

    Times are seconds of `time.perf_counter`; in the file, microseconds since `start`. `samples` has the queues and the
    pool after each step.
    """

    def __init__(
        self, scheduler: Scheduler, adapters: AdapterSource, names: Mapping[str, str], page_bytes: int
    ) -> None:
        """Starts the recording. `names` are registered adapters by digest; `page_bytes` is over all layers."""
        self._scheduler, self._adapters, self._page_bytes = scheduler, adapters, page_bytes
        self.samples: list[PoolSample] = []
        self._events: list[dict[str, Any]] = []
        self._in_flight: dict[int, tuple[float, int, dict[str, int]]] = {}  # by id: dispatch time, number, details
        self._steps = 0
        self._copies: dict[int, _Copy] = {}  # by the resident's id
        self._landed = 0  # number of adapters since the last dispatch
        self._ended: list[PoolStay] = []
        self._resident = {r.digest: (r, _stay(r, names, None)) for r in scheduler.residency.residents}
        self.start = time.perf_counter()
        self.sample()

    def stays(self) -> list[PoolStay]:
        """Returns the adapters' stays in the pool, finished ones first."""
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
        if id(resident) not in self._copies or not resident.present:  # started before the recording, or evicted
            return
        self._copies[id(resident)].steps.append(self._steps)
        if resident.has_landed:
            self._landed += 1
            self._record_copy(self._copies.pop(id(resident)))

    def planned(self, plan: StepPlan, scheduler: Scheduler) -> None:
        now = time.perf_counter()
        for key, copy in list(self._copies.items()):
            if not copy.resident.present:
                self._record_copy(self._copies.pop(key))
        names = {use.digest: use.name for s in plan.sequences if (use := s.request.adapter) is not None}
        residents = {r.digest: r for r in scheduler.residency.residents}
        for digest, (resident, stay) in list(self._resident.items()):
            if residents.get(digest) is not resident:  # evicted, perhaps uploaded again in the same plan
                self._ended.append(PoolStay(stay.adapter, digest, stay.pages, stay.loaded, now))
                del self._resident[digest]
        for digest, resident in residents.items():
            if digest not in self._resident:
                waiting = scheduler.waiting.by_adapter.get(digest)
                if waiting and (use := waiting[0].adapter) is not None:  # prefetched for this request
                    names[digest] = use.name
                self._resident[digest] = (resident, _stay(resident, names, now))

    def dispatched(self, step: object, plan: StepPlan) -> None:
        uploads, self._landed = self._landed + len(plan.loads), 0
        details = {"tokens": plan.num_tokens, "sequences": len(plan.sequences), "uploads": uploads}
        self._in_flight[id(step)] = (time.perf_counter(), self._steps, details)
        self._steps += 1

    def tokens_read(self, step: object) -> None:
        if id(step) in self._in_flight:  # the first one may have been dispatched before the recording started
            start, number, details = self._in_flight.pop(id(step))
            self._complete(DEVICE[number % 2], f"step {number}", start, **details)

    def disk(self, name: str, digest: str, nbytes: int, start: float) -> None:
        """Records a read or write of `nbytes` by the calling thread, from `start` until now. Any thread may call it."""
        self._complete(f"disk: {threading.current_thread().name}", name, start, bytes=nbytes, digest=digest[:12])

    def sample(self) -> None:
        """Records the current queues and pool."""
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
        """Returns all events so far in the Trace Event Format: track names, then events by time."""
        events = list(self._events)  # copied, because disk threads may append
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

    def _record_copy(self, copy: _Copy) -> None:
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
        """Adds an event to a track, from `start` (or the recording's start) until now."""
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
