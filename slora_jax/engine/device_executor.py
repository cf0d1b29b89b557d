"""The executor on real devices: turns plans into metadata, program calls and uploads."""

from __future__ import annotations

import time
from collections import Counter, deque
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import NamedTuple

import jax

from slora_jax.adapters import AdapterStore, AdapterTiles
from slora_jax.engine.after_step import mask_words
from slora_jax.engine.batch import build_metadata, shared_rows
from slora_jax.engine.core import Landing
from slora_jax.engine.device import Copy, Device
from slora_jax.engine.merge import AdapterMerge
from slora_jax.engine.sampling import Sampled
from slora_jax.engine.step_spec import Lora
from slora_jax.engine.structured import logit_edits
from slora_jax.errors import AdapterError, ProcessLostError
from slora_jax.memory import AdapterResidency, Resident, Upload
from slora_jax.metrics import Counters
from slora_jax.scheduling import AdapterState, ScheduledSequence, StepPlan

DISK_WAIT_SECONDS = 0.05
"""Maximum wait for an adapter's read from disk, short because requests may arrive during the wait."""

IDLE_SECONDS = 0.001
"""Wait when nothing is running and the policy admits no waiting request."""


@dataclass
class DispatchedStep:
    """A step on the device.

    Attributes:
      sequences: sequences in batch order.
      sampled: tokens, and log-probabilities if requested; None until the step's logits are edited.
      logits: float32 `[S, vocab]`, vocab rounded up to a multiple of the shards; None unless `keep_logits`.
      pooled: see `StepOutput`.
    """

    sequences: list[ScheduledSequence]
    sampled: Sampled | None
    logits: jax.Array | None
    pooled: jax.Array | None = None


class _Staged(NamedTuple):
    upload: Upload
    copy: Copy


class DeviceExecutor:
    """Executes plans on a `Device` with the adapters of a store. Owns the uploads in flight.

    A prefetch takes two calls: `stage` starts the copy to the device, on which no dispatched work depends. Once the
    copy has finished, `landed` dispatches its move into the pool, within device memory.

    A step with a grammar or a logit bias is dispatched in two parts: its forward pass with the plan, and its sampling
    once the tokens of the step before are read, before the next step is dispatched. The host computes the tokens
    that a grammar allows while the forward pass runs, so every sequence is in every step.
    """

    def __init__(
        self, device: Device, store: AdapterStore, residency: AdapterResidency, *, keep_logits: bool = False
    ) -> None:
        """With `keep_logits`, dispatched steps hold their logits."""
        self.device = device
        self._store = store
        self._residency = residency
        self._counters: Counters = residency.evictor.counters
        self._lora = device.spec.lora
        self._merge = AdapterMerge(device, self._counters) if self._lora == "merge" else None
        self._keep_logits = keep_logits
        self._tiles: dict[str, AdapterTiles] = {}  # by digest, held from planning until the upload is complete
        self._lost: dict[str, str] = {}
        self._staged: deque[_Staged] = deque()
        self._unsampled: DispatchedStep | None = None
        self._pools = any(bucket.pools for bucket in device.programs.buckets)

    @property
    def pages_in_flight(self) -> int:
        """Number of pages whose copy to the device has started but not landed."""
        return sum(upload.count for upload, _ in self._staged)

    @property
    def page_bytes(self) -> int:
        """Bytes per page over all layers."""
        return self.device.spec.pool.page_bytes

    def adapter_state(self, digest: str) -> AdapterState:
        """Returns the state of an adapter's tiles. Holds tiles in memory for the upload; starts the read of others."""
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
        """Returns the digests of adapters found unreadable since the last call, with the reason."""
        lost, self._lost = self._lost, {}
        return lost

    def stage(self, upload: Upload) -> None:
        """Starts the copy of some pages of an adapter. If it raises the device's error, nothing is staged."""
        contents = self._tiles[upload.resident.digest].pages
        with self._launch():
            copy = self.device.begin_copy(contents[:, upload.first : upload.first + upload.count])
        self._staged.append(_Staged(upload, copy))

    def landed(self) -> list[Landing]:
        """Moves copied pages into the pool, in the order of staging, and sets the table row of complete adapters."""
        landings = []
        with self._launch():
            while self._staged and self._staged[0].copy.is_there():
                staged = self._staged.popleft()
                landings.append(Landing(staged.upload, self._move(*staged)))
        return landings

    def upload(self, resident: Resident) -> None:
        """Dispatches the upload of a whole adapter. Each device receives its own columns."""
        tiles = self._tiles.pop(resident.digest)
        with self._launch():
            if self._merge is not None:
                self._merge.before_upload(resident)
            self.device.upload(resident.slot, resident.pages, resident.ranks, tiles.pages)
        self._counters.upload_bytes += resident.num_pages * self.page_bytes

    def dispatch(self, plan: StepPlan) -> DispatchedStep:
        """Starts a step and the copies of its results to the host, without waiting."""
        device = self.device
        self._sample()
        if self._merge is not None:
            self._merge.before_step(plan)
        with_lora = self._merge is None and _lora_of(plan)
        segments = _segments(plan) if self._lora == "bmm" else ()
        pools = self._pools and any(s.request.pools_at(s.start) for s in plan.sequences)
        key, layout = device.programs.select(plan.num_tokens, plan.num_sequences, with_lora, segments, pools)
        metadata, sequences = build_metadata(plan, layout)
        with self._launch():
            rows = list(shared_rows(plan.hits, device.state.page_table))
            is_edited = any(s.samples and s.request.edits_logits for s in sequences)
            sampled, output = device.step(key, metadata, rows, None if is_edited else _after_step(sequences))
        logits = output.logits if self._keep_logits else None
        step = DispatchedStep(sequences, None if is_edited else sampled, logits, output.pooled)
        if is_edited:
            self._unsampled, self._seqs = step, device.programs.bucket(key).seqs
        self._start_copies(step.sampled, step.logits, step.pooled)
        self._release_tiles()
        return step

    def read(self, step: DispatchedStep) -> list[int]:
        """Waits for a step's tokens. Raises RuntimeError if its sampling failed before."""
        if step is self._unsampled:
            self._sample()
        if step.sampled is None:
            raise RuntimeError("the step's tokens were not sampled, because an earlier call failed")
        tokens: list[int] = self.device.read(step.sampled.token).tolist()
        return tokens

    def wait(self, digest: str | None) -> None:
        """Waits for the oldest copy in flight. If there is none, waits briefly for `digest` to be read from disk."""
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
                pass  # still being read, or lost: the next plan reports it
        else:
            time.sleep(IDLE_SECONDS)
        self._release_tiles()

    @property
    def is_lost(self) -> bool:
        """True if another process is lost, so that no call can be executed."""
        return self.device.is_lost

    def close(self) -> None:
        self.device.close()

    def _sample(self) -> None:
        """Edits the logits of the step in flight, if it needs that, and samples its tokens. All tokens before it must
        be read."""
        step, self._unsampled = self._unsampled, None
        if step is None:
            return
        edits = logit_edits(step.sequences, self._seqs, mask_words(self.device.spec))
        with self._launch():
            step.sampled = self.device.sample(_after_step(step.sequences), edits)
        self._start_copies(step.sampled)

    def _start_copies(self, *results: Sampled | jax.Array | None) -> None:
        """Starts the copies of a step's results to the host."""
        if not self.device.spec.layered:  # a CPU's results need no copy
            for leaf in jax.tree.leaves(results):
                leaf.copy_to_host_async()

    def _move(self, upload: Upload, copy: Copy) -> str | None:
        """Moves copied pages into the pool. Returns the error if that fails, else None."""
        resident, device = upload.resident, self.device
        if not resident.present:  # evicted during the copy; its pages may be in use again
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
        except Exception as error:  # noqa: BLE001  must be reported, or requests would wait forever
            return repr(error)
        self._counters.upload_bytes += upload.count * self.page_bytes
        return None

    def _release_tiles(self) -> None:
        """Drops the tiles of adapters without further pages to upload."""
        for digest in self._tiles.keys() - self._residency.arriving.keys():
            del self._tiles[digest]

    @contextmanager
    def _launch(self) -> Iterator[None]:
        """Counts the CPU time of calls that dispatch work to the device."""
        start = time.thread_time()
        try:
            yield
        finally:
            self._counters.launch_seconds += time.thread_time() - start


def _after_step(sequences: list[ScheduledSequence]) -> list[str]:
    """Returns the programs of `AFTER_STEP` that a step needs."""
    sampled = [s.request.params for s in sequences if s.request.params.temperature > 0]
    needs = {
        "cutoff": any(params.top_k or params.top_p < 1 for params in sampled),
        "sample": bool(sampled),
        "logprobs": any(s.request.params.logprobs is not None or s.start < s.request.num_scored for s in sequences),
    }
    return [kind for kind, needed in needs.items() if needed]


def _lora_of(plan: StepPlan) -> Lora:
    """Returns the LoRA work that a step needs, without regard to padding."""
    adapters = [s.request.adapter for s in plan.sequences if s.adapter_slot >= 0]
    if any(adapter is not None and adapter.has_experts for adapter in adapters):
        return "experts"
    if any(adapter is not None and adapter.has_extras for adapter in adapters):
        return "extras"
    return bool(adapters)


def _segments(plan: StepPlan) -> list[int]:
    """Returns the number of tokens of each adapter in a step."""
    rows: Counter[int] = Counter()
    for sequence in plan.sequences:
        rows[sequence.adapter_slot] += sequence.count
    return [count for slot, count in rows.items() if slot >= 0]
