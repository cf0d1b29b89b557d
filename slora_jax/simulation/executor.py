"""The executor of a simulation: what a step takes by the cost model, on a virtual clock."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from slora_jax.engine.core import Landing
from slora_jax.errors import RequestError
from slora_jax.memory import AdapterResidency, Resident, Upload
from slora_jax.scheduling import AdapterState, ScheduledSequence, StepPlan
from slora_jax.simulation.arrivals import Arrivals
from slora_jax.simulation.cost import CostModel
from slora_jax.simulation.loading import Lane, Loading
from slora_jax.simulation.system import SystemConfig
from slora_jax.simulation.work import StepWork, step_work


class VirtualClock:
    """Seconds from the start of the simulation, on one replica's host."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


@dataclass(slots=True)
class SimulatedStep:
    """A step on the device. ended: seconds; its tokens are known then. sequences: empty in the midst of a fast forward,
    which reads its steps itself."""

    sequences: Sequence[ScheduledSequence]
    ended: float


class SimulatedExecutor:
    """Carries out plans on a virtual clock: the host's time passes in `dispatch`, the device's until `read`. The device
    lane may be shared with other replicas."""

    def __init__(
        self,
        system: SystemConfig,
        cost: CostModel,
        ranks: Mapping[str, int],
        loading: Loading,
        residency: AdapterResidency,
        device: Lane,
        clock: VirtualClock,
        arrivals: Arrivals,
    ) -> None:
        """ranks: by adapter digest. arrivals: until the next of which `wait` may last."""
        self.cost, self.ranks, self.loading = cost, ranks, loading
        self._system, self._residency, self._device = system, residency, device
        self._counters = residency.evictor.counters
        self._clock, self._arrivals = clock, arrivals
        self._last_end = 0.0  # of this replica's last step, in whose launches others may have the device
        self._merged: str | None = None
        self._has_landed = False  # an adapter, since the last step

    @property
    def pages_in_flight(self) -> int:
        """Pages of uploads that have not landed."""
        return self.loading.pages_in_flight

    def adapter_state(self, digest: str) -> AdapterState:
        """Returns where an adapter is on the host. Starts the read of those on disk."""
        return self.loading.state(digest, self._clock.now)

    def lost(self) -> Mapping[str, str]:
        """Nothing is lost in a simulation."""
        return {}

    def stage(self, upload: Upload) -> None:
        """Begins a copy beside the steps."""
        self.loading.stage(upload, self._clock.now)

    def landed(self) -> list[Landing]:
        """Uploads that have arrived by now."""
        landings = [Landing(upload) for upload in self.loading.landed(self._clock.now)]
        for upload, _ in landings:
            resident = upload.resident
            self._has_landed |= resident.present and upload.first + upload.count == resident.num_pages
        return landings

    def upload(self, resident: Resident) -> None:
        """`dispatch` accounts for the plan's loads."""

    def dispatch(self, plan: StepPlan) -> SimulatedStep:
        """Starts a step: the host's part, the wait for the plan's loads, changes of weights, the step itself."""
        work = step_work(plan.sequences, self.ranks)
        return self.launch(work, self._changes(plan), plan.loads, plan.sequences)

    def launch(
        self,
        work: StepWork,
        changes: float = 0.0,
        loads: Iterable[Resident] = (),
        sequences: Sequence[ScheduledSequence] = (),
    ) -> SimulatedStep:
        """Starts a step of `work`, after `loads` and `changes` seconds on the device."""
        counters, clock = self._counters, self._clock
        host = self.cost.host_seconds(work)
        clock.now += host
        ready = max(clock.now, self._device.free, self._last_end)
        start = max(ready, self.loading.load(loads, clock.now))
        self._device.take(start, self.cost.busy_seconds(work) + changes)
        self._last_end = start + self.cost.step_seconds(work) + changes
        counters.host_seconds += host
        counters.stall_seconds += start - ready
        return SimulatedStep(sequences, self._last_end)

    def read(self, step: SimulatedStep) -> list[int]:
        """Waits for a step. A request's tokens are its own number, as its prompt's are (`SimulatedRequest.prompt`)."""
        self.wait_for(step)
        return [int(sequence.request.id) for sequence in step.sequences]

    def wait_for(self, step: SimulatedStep) -> None:
        """Waits until a step has ended."""
        self._clock.now = max(self._clock.now, step.ended)

    def wait(self, digest: str | None) -> None:
        """Nothing can run: waits for the next arrival of a request, or of an adapter from disk or over the copy lane.
        With a copy in flight the device stalls for it.

        Raises:
          RequestError: none will come.
        """
        now = self._clock.now
        event = min(self._arrivals.next, self.loading.next_event(now))
        if event == math.inf:
            raise RequestError("requests wait, and nothing will ever let them run")
        if self.loading.next_landing(now) < math.inf:
            self._counters.stall_seconds += event - now
        self._clock.now = event

    def _changes(self, plan: StepPlan) -> float:
        """Seconds on the device before the step itself: merging, or gathering adapters anew."""
        landed, self._has_landed = self._has_landed, False
        if self._system.merged:
            return self._switch(plan.sequences[0].request.digest)
        if self._system.gathers_on_load and (plan.loads or landed):
            return self.cost.move_seconds(sum(self.loading.nbytes[r.digest] for r in self._residency.residents))
        return 0.0

    def _switch(self, digest: str | None) -> float:
        if digest == self._merged:
            return 0.0
        changed = [self.ranks[name] for name in (self._merged, digest) if name is not None]
        self._merged = digest
        self._counters.adapter_merges += 1
        return sum(self.cost.merge_seconds(rank) for rank in changed)
