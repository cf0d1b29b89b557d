"""The executor on real devices: from plans to programs, metadata and uploads."""

from __future__ import annotations

import time
from collections import Counter, deque
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import NamedTuple

import jax

from slora_jax.adapters import AdapterStore, AdapterTiles
from slora_jax.engine.batch import build_metadata, shared_rows
from slora_jax.engine.core import Landing
from slora_jax.engine.device import Copy, Device
from slora_jax.engine.merge import AdapterMerge
from slora_jax.engine.sampling import Sampled
from slora_jax.errors import AdapterError, ProcessLostError
from slora_jax.memory import AdapterResidency, Resident, Upload
from slora_jax.metrics import Counters
from slora_jax.scheduling import AdapterState, ScheduledSequence, StepPlan

DISK_WAIT_SECONDS = 0.05
"""Longest wait for an adapter's read from disk; requests may arrive meanwhile."""

IDLE_SECONDS = 0.001
"""Wait when a policy admits none of the waiting requests and nothing runs."""


@dataclass(frozen=True)
class DispatchedStep:
    """A step on the device.

    Attributes:
      sequences: in the order of its batch.
      sampled: tokens, and log-probabilities if asked for.
      logits: float32 `[S, vocab]` (several shards round the vocabulary up); None unless the engine keeps them.
    """

    sequences: list[ScheduledSequence]
    sampled: Sampled
    logits: jax.Array | None


class _Staged(NamedTuple):
    upload: Upload
    copy: Copy


class DeviceExecutor:
    """Carries out plans on a `Device`, with the adapters of a store. Owns the uploads in flight.

    An upload beside the steps takes two calls: `stage` begins the copy, which nothing that is dispatched depends on;
    `landed`, once the copy has ended, dispatches its move into the pool, within device memory.
    """

    def __init__(
        self, device: Device, store: AdapterStore, residency: AdapterResidency, *, keep_logits: bool = False
    ) -> None:
        """residency: of the engine, for its counters and the adapters that have not landed. keep_logits: whether steps
        carry their logits."""
        self.device = device
        self._store = store
        self._residency = residency
        self._counters: Counters = residency.evictor.counters
        self._lora = device.spec.lora
        self._merge = AdapterMerge(device, self._counters) if self._lora == "merge" else None
        self._keep_logits = keep_logits
        self._tiles: dict[str, AdapterTiles] = {}  # found in host memory while planning; kept until all is uploaded
        self._lost: dict[str, str] = {}
        self._staged: deque[_Staged] = deque()

    @property
    def pages_in_flight(self) -> int:
        """Pages whose copy to the device has begun and has not landed."""
        return sum(upload.count for upload, _ in self._staged)

    @property
    def page_bytes(self) -> int:
        """Bytes of a page over all layers."""
        return self.device.spec.pool.page_bytes

    def adapter_state(self, digest: str) -> AdapterState:
        """Returns where an adapter's tiles are. Those in memory are held for the upload; those on disk begin to be
        read."""
        try:
            tiles = self._store.request(digest)
        except AdapterError as error:
            self._lost[digest] = str(error)
            return AdapterState.FAILED
        if tiles is None:
            return AdapterState.LOADING
        self._tiles[digest] = tiles
        return AdapterState.READY

    def lost(self) -> Mapping[str, str]:
        """Digests of adapters that were found unreadable since the last call, with the reason."""
        lost, self._lost = self._lost, {}
        return lost

    def stage(self, upload: Upload) -> None:
        """Begins the copy of some pages of an adapter. Raises the device's error; nothing is staged then."""
        contents = self._tiles[upload.resident.digest].pages
        with self._launch():
            copy = self.device.begin_copy(contents[:, upload.first : upload.first + upload.count])
        self._staged.append(_Staged(upload, copy))

    def landed(self) -> list[Landing]:
        """Moves staged pages that have arrived into the pool, in the order of staging; after an adapter's last ones,
        its table row is set."""
        landings = []
        with self._launch():
            while self._staged and self._staged[0].copy.is_there():
                staged = self._staged.popleft()
                landings.append(Landing(staged.upload, self._move(*staged)))
        return landings

    def upload(self, resident: Resident) -> None:
        """Dispatches the upload of a whole adapter; with several devices, each receives its own columns."""
        tiles = self._tiles.pop(resident.digest)
        with self._launch():
            if self._merge is not None:
                self._merge.before_upload(resident)
            self.device.upload(resident.slot, resident.pages, resident.ranks, tiles.pages)
        self._counters.upload_bytes += resident.num_pages * self.page_bytes

    def dispatch(self, plan: StepPlan) -> DispatchedStep:
        """Starts a step and returns at once; the copies of its results to the host are started too."""
        device = self.device
        if self._merge is not None:
            self._merge.before_step(plan)
        with_lora = self._merge is None and any(s.request.adapter_slot >= 0 for s in plan.sequences)
        segments = _segments(plan) if self._lora == "bmm" else ()
        key, layout = device.programs.select(plan.num_tokens, plan.num_sequences, with_lora, segments)
        metadata, sequences = build_metadata(plan, layout)
        logprobs = any(s.request.params.logprobs is not None or s.start < s.request.num_scored for s in sequences)
        has_sampler = logprobs or any(s.request.params.temperature > 0 for s in sequences)
        with self._launch():
            rows = list(shared_rows(plan.hits, device.state.page_table))
            sampled, logits = device.step(key, metadata, rows, logprobs if has_sampler else None)
        step = DispatchedStep(sequences, sampled, logits if self._keep_logits else None)
        if not device.spec.layered:  # on a CPU they are read in place
            for leaf in jax.tree.leaves((step.sampled, step.logits)):
                leaf.copy_to_host_async()
        self._release_tiles()
        return step

    def read(self, step: DispatchedStep) -> list[int]:
        """Waits for a step's tokens."""
        tokens: list[int] = self.device.read(step.sampled.token).tolist()
        return tokens

    def wait(self, digest: str | None) -> None:
        """Waits for the oldest copy in flight; without any, for a moment for `digest` to be read from disk."""
        if self._staged:
            try:
                self._staged[0].copy.wait()
            except ProcessLostError:
                raise
            except Exception:  # noqa: BLE001  `landed` reports it
                pass
        elif digest is not None:
            try:
                self._store.wait(digest, timeout=DISK_WAIT_SECONDS)
            except AdapterError:
                pass  # not there yet; or lost, which the next plan reports
        else:
            time.sleep(IDLE_SECONDS)
        self._release_tiles()

    @property
    def is_lost(self) -> bool:
        """Returns whether another process is lost, so that nothing can be executed any more."""
        return self.device.is_lost

    def close(self) -> None:
        """Nothing more is executed."""
        self.device.close()

    def _move(self, upload: Upload, copy: Copy) -> str | None:
        """Returns why the copy failed, if it did; the pool is not touched then."""
        resident, device = upload.resident, self.device
        if not resident.present:  # evicted meanwhile, and its pages may belong to others
            device.discard(copy)
            return None
        try:
            copy.wait()
        except Exception as error:  # noqa: BLE001  one adapter must not disturb the others
            device.discard(copy)
            return repr(error)
        last = upload.first + upload.count
        try:
            if self._merge is not None:
                self._merge.before_upload(resident)
            device.move(copy, resident.pages[upload.first : last])
            if last == resident.num_pages:
                device.describe(resident.slot, resident.pages, resident.ranks)
        except ProcessLostError:
            raise
        except Exception as error:  # noqa: BLE001  unreported, it would be awaited for ever
            return repr(error)
        self._counters.upload_bytes += upload.count * self.page_bytes
        return None

    def _release_tiles(self) -> None:
        """Keeps the tiles of adapters that have more pages to upload."""
        for digest in self._tiles.keys() - self._residency.arriving.keys():
            del self._tiles[digest]

    @contextmanager
    def _launch(self) -> Iterator[None]:
        """Counts the CPU time of calls that give the device work."""
        start = time.thread_time()
        try:
            yield
        finally:
            self._counters.launch_seconds += time.thread_time() - start


def _segments(plan: StepPlan) -> list[int]:
    """Rows of each adapter in a step."""
    rows: Counter[int] = Counter()
    for sequence in plan.sequences:
        rows[sequence.request.adapter_slot] += sequence.count
    return [count for slot, count in rows.items() if slot >= 0]
