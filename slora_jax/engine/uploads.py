"""Adapters on their way from the host store to the pool: found in memory, staged, landed, or given up."""

from __future__ import annotations

from collections.abc import Callable

from slora_jax.adapters import AdapterStore, AdapterTiles
from slora_jax.engine.runner import Runner
from slora_jax.engine.trace import NoTrace
from slora_jax.errors import AdapterError, ProcessLostError
from slora_jax.memory import AdapterResidency, Upload
from slora_jax.scheduling import AdapterState, AdapterUse, StepPlan


class AdapterUploads:
    """Holds the tiles that plans are to upload, and takes note of what arrived. An adapter that cannot be brought ends
    the requests that wait for it, and no others."""

    def __init__(
        self,
        store: AdapterStore,
        residency: AdapterResidency,
        runner: Runner,
        end_waiting: Callable[[str, str], None],
    ) -> None:
        """end_waiting: ends the requests that wait for a digest, and tells them why."""
        self._store, self._residency, self._runner, self._end_waiting = store, residency, runner, end_waiting
        self.tiles: dict[str, AdapterTiles] = {}
        """By digest: found in memory while planning; kept until all is uploaded."""
        self.pages = 0  # copied to the device since the engine's start
        self._lost: dict[str, AdapterError] = {}  # digests that could not be brought back from disk

    def state(self, digest: str) -> AdapterState:
        """The scheduler's question; what is found in memory is held for its upload."""
        try:
            tiles = self._store.request(digest)
        except AdapterError as error:
            self._lost[digest] = error
            return AdapterState.FAILED
        if tiles is None:
            return AdapterState.LOADING
        self.tiles[digest] = tiles
        return AdapterState.READY

    def land(self, trace: NoTrace, wait: bool = False) -> None:
        """Takes note of the copies that have arrived. wait: for one of them, if none has."""
        for landing in self._runner.land(wait):
            self._residency.land(landing.upload)
            trace.landed(landing.upload)
            if landing.error is not None:
                self._give_up(landing.upload, landing.error)
            else:
                self.pages += landing.upload.count

    def stage(self, plan: StepPlan, trace: NoTrace) -> None:
        """Begins the copies that go beside the plan's step; those begun leave the plan."""
        while plan.uploads:
            self._stage(plan.uploads[0], trace)
            plan.uploads.pop(0)
        kept = self._residency.arriving.keys() | {resident.digest for resident in plan.loads}
        for digest in self.tiles.keys() - kept:
            del self.tiles[digest]

    def upload(self, plan: StepPlan, trace: NoTrace) -> None:
        """Uploads what must be there before the plan's step."""
        for resident in plan.loads:
            tiles = self.tiles[resident.digest]
            with trace.upload(resident, tiles):
                self._runner.upload(resident, tiles.pages)
            self.pages += resident.num_pages

    def abandon(self, plan: StepPlan) -> None:
        """After a failure: forgets what may not have reached the pool."""
        for resident in plan.loads:
            self._residency.drop(resident.digest)
        for upload in plan.uploads:
            self._residency.land(upload)
            self._residency.drop(upload.resident.digest)

    def wait_for_disk(self, first: AdapterUse | None) -> None:
        """Nothing runs, and the adapter of the first waiting request is on its way from disk: gives it a moment."""
        if first is not None and first.digest not in self._residency:
            try:
                self._store.wait(first.digest, timeout=0.05)
            except AdapterError:
                pass  # not there yet; or lost, which the next plan reports

    def end_lost(self) -> None:
        """Ends the requests whose adapter was found to be lost while planning."""
        lost, self._lost = self._lost, {}
        for digest, error in lost.items():
            self._end_waiting(digest, str(error))

    def _stage(self, upload: Upload, trace: NoTrace) -> None:
        resident = upload.resident
        if not resident.present:  # given up a moment ago, as an earlier part of it failed
            self._residency.land(upload)
            return
        tiles = self.tiles[resident.digest]
        try:
            self._runner.stage(upload, tiles.pages)
        except ProcessLostError:
            raise
        except Exception as error:  # noqa: BLE001  one adapter must not disturb the others
            self._residency.land(upload)
            self._give_up(upload, repr(error))
            return
        trace.staged(upload, tiles)

    def _give_up(self, upload: Upload, error: str) -> None:
        """Ends the requests that wait for an adapter that cannot be copied to the device."""
        digest = upload.resident.digest
        self._end_waiting(digest, f"content {digest[:12]} could not be copied to the device: {error}")
        self._residency.drop(digest)
