"""An executor without a device: tokens are ready at once, uploads land after some steps."""

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field

from slora_jax.engine.core import Landing
from slora_jax.memory import Resident, Upload
from slora_jax.scheduling import AdapterState, Request, ScheduledSequence, StepPlan


@dataclass
class FakeStep:
    """A dispatched step."""

    sequences: list[ScheduledSequence]


@dataclass
class FakeExecutor:
    """Carries out plans without a device.

    Attributes:
      sample: returns the next token of a request.
      copy_steps: steps until an upload has landed.
      state: returns the tier of an adapter.
      copies: uploads in flight, each with the step in which it lands.
      uploaded: digests of whole adapters uploaded before a step.
    """

    sample: Callable[[Request], int] = lambda request: 0
    copy_steps: int = 1
    state: Callable[[str], AdapterState] = lambda digest: AdapterState.READY
    steps: int = 0
    copies: deque[tuple[int, Upload]] = field(default_factory=deque)
    uploaded: list[str] = field(default_factory=list)
    lost_adapters: dict[str, str] = field(default_factory=dict)

    @property
    def pages_in_flight(self) -> int:
        return sum(upload.count for _, upload in self.copies)

    def adapter_state(self, digest: str) -> AdapterState:
        return self.state(digest)

    def lost(self) -> dict[str, str]:
        lost, self.lost_adapters = self.lost_adapters, {}
        return lost

    def stage(self, upload: Upload) -> None:
        self.copies.append((self.steps + self.copy_steps, upload))

    def landed(self) -> list[Landing]:
        landings = []
        while self.copies and self.copies[0][0] <= self.steps:
            landings.append(Landing(self.copies.popleft()[1]))
        return landings

    def upload(self, resident: Resident) -> None:
        self.uploaded.append(resident.digest)

    def dispatch(self, plan: StepPlan) -> FakeStep:
        return FakeStep(plan.sequences)

    def read(self, step: FakeStep) -> list[int]:
        return [self.sample(sequence.request) for sequence in step.sequences]

    def wait(self, digest: str | None) -> None:
        if self.copies:
            self.copies[0] = (self.steps, self.copies[0][1])
