"""The simulated executor: steps take the cost model's time on a virtual clock."""

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
    """Seconds from the start of the simulation on one replica's host."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


@dataclass(slots=True)
class SimulatedStep:
    """A step on the device.

    Attributes:
      sequences: empty within a fast forward, which reads its steps itself.
      ended: seconds from the start; the step's tokens are then available.
    """

    sequences: Sequence[ScheduledSequence]
    ended: float


class SimulatedExecutor:
    """Executes plans on a virtual clock: host time passes in `dispatch`, device time until `read`.

    Other replicas may share the device lane.
    """

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
        """Sets up the executor.

        Args:
          ranks: by adapter digest.
          arrivals: future requests; `wait` ends at the next one at the latest.
        """
        self.cost, self.ranks, self.loading = cost, ranks, loading
        self._system, self._residency, self._device = system, residency, device
        self._counters = residency.evictor.counters
        self._clock, self._arrivals = clock, arrivals
        self._last_end = 0.0  # of this replica's last step; others may use the device during its launches
        self._merged: str | None = None
        self._adapter_landed = False  # since the last step

    @property
    def pages_in_flight(self) -> int:
        """Pages of uploads that have not landed."""
        return self.loading.pages_in_flight

    def adapter_state(self, digest: str) -> AdapterState:
        """Returns an adapter's state on the host; starts reading it if it is on disk."""
        return self.loading.state(digest, self._clock.now)

    def lost(self) -> Mapping[str, str]:
        """Returns no adapters: none is lost in a simulation."""
        return {}

    def stage(self, upload: Upload) -> None:
        """Starts a copy that overlaps with steps."""
        self.loading.stage(upload, self._clock.now)

    def landed(self) -> list[Landing]:
        """Returns the uploads that have completed since the last call."""
        landings = [Landing(upload) for upload in self.loading.landed(self._clock.now)]
        for upload, _ in landings:
            resident = upload.resident
            self._adapter_landed |= resident.present and upload.first + upload.count == resident.num_pages
        return landings

    def upload(self, resident: Resident) -> None:
        """Does nothing; `dispatch` accounts for the plan's loads."""

    def dispatch(self, plan: StepPlan) -> SimulatedStep:
        """Starts a step: host work, the wait for the plan's loads, changes of weights, then the step itself."""
        work = step_work(plan.sequences, self.ranks)
        return self.launch(work, self._changes(plan), plan.loads, plan.sequences)

    def launch(
        self,
        work: StepWork,
        changes: float = 0.0,
        loads: Iterable[Resident] = (),
        sequences: Sequence[ScheduledSequence] = (),
    ) -> SimulatedStep:
        """Starts a step of `work`, after the copies `loads` and after `changes` seconds on the device."""
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
        """Waits for a step and returns its tokens. A request's tokens all equal its number, as in its prompt."""
        self.wait_for(step)
        return [int(sequence.request.id) for sequence in step.sequences]

    def wait_for(self, step: SimulatedStep) -> None:
        """Waits until a step has ended."""
        self._clock.now = max(self._clock.now, step.ended)

    def wait(self, digest: str | None) -> None:
        """Waits, when nothing can run, for the next request, read from disk or copy to the device. Waiting for a copy
        counts as a stall.

        Raises:
          RequestError: no such event will occur.
        """
        now = self._clock.now
        event = min(self._arrivals.next, self.loading.next_event(now))
        if event == math.inf:
            raise RequestError("waiting requests can never run: no arrival, disk read or upload is pending")
        if self.loading.next_landing(now) < math.inf:
            self._counters.stall_seconds += event - now
        self._clock.now = event

    def _changes(self, plan: StepPlan) -> float:
        """Seconds on the device before the step itself, to merge or to gather adapters."""
        landed, self._adapter_landed = self._adapter_landed, False
        if self._system.merged:
            return self._merge(plan.sequences[0].request.digest)
        if self._system.gathers_on_load and (plan.loads or landed):
            return self.cost.move_seconds(sum(self.loading.nbytes[r.digest] for r in self._residency.residents))
        return 0.0

    def _merge(self, digest: str | None) -> float:
        """Seconds to unmerge the present adapter and merge this one (None: only unmerge)."""
        if digest == self._merged:
            return 0.0
        changed = [self.ranks[name] for name in (self._merged, digest) if name is not None]
        self._merged = digest
        self._counters.adapter_merges += 1
        return sum(self.cost.merge_seconds(rank) for rank in changed)
