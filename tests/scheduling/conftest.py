"""A scheduler without a device: requests of any size, a device that returns each step's tokens one step late, and a
lane on which copies take their time."""

from collections import deque
from collections.abc import Callable

import pytest
from make_request import make_request

from slora_jax.memory import (
    AdapterResidency,
    EvictionPolicy,
    Evictor,
    Lru,
    PageAllocator,
    PageKind,
    PrefixCache,
    Upload,
)
from slora_jax.scheduling import (
    AdapterState,
    Fcfs,
    FinishReason,
    Policy,
    Request,
    Scheduler,
    SchedulerLimits,
    StepPlan,
)

PAGE_SIZE = 4


class Simulation:
    """Steps a scheduler as the engine does: plan a step, then read the results of the step before.

    copy_steps: after how many steps an upload has landed; when nothing runs, the oldest lands at once.
    """

    def __init__(
        self,
        num_pages: int,
        max_seqs: int,
        max_tokens: int,
        adapter_slots: int = 64,
        policy: Policy | None = None,
        adapter_state: Callable[[str], AdapterState] = lambda digest: AdapterState.READY,
        admission: str = "optimistic",
        adapter_pages: int | None = None,
        eviction: EvictionPolicy | None = None,
        prefetch: int = 0,
        upload_pages: int = 8,
        copy_steps: int = 1,
        prefix_cache: bool = False,
    ) -> None:
        self.allocator = PageAllocator(num_pages + 1, adapter_pages)
        self.evictor = Evictor(self.allocator, eviction or Lru())
        self.residency = AdapterResidency(self.evictor, adapter_slots)
        self.prefixes = PrefixCache(self.evictor, PAGE_SIZE) if prefix_cache else None
        limits = SchedulerLimits(max_seqs, max_tokens, PAGE_SIZE, admission, prefetch, upload_pages)
        self.scheduler = Scheduler(self.residency, policy or Fcfs(), limits, adapter_state, self.prefixes)
        self.requests: list[Request] = []
        self.stop_early: dict[int, int] = {}  # request number -> output tokens after which it meets a stop token
        self.steps = 0
        self.copy_steps = copy_steps
        self.copies: deque[tuple[int, Upload]] = deque()  # with the step by which each has landed
        self._in_flight: StepPlan | None = None

    def add(
        self, prompt: int | list[int], new: int, adapter: str | None = None, adapter_pages: int = 0, tenant: str = ""
    ) -> Request:
        """A request of `prompt` tokens (their number, or their ids) that may generate `new`, with an adapter of
        `adapter_pages`."""
        request = make_request(len(self.requests), float(self.steps), prompt, new, adapter, adapter_pages, tenant)
        self.requests.append(request)
        self.scheduler.add(request)
        return request

    def step(self) -> StepPlan:
        while self.copies and self.copies[0][0] <= self.steps:
            self.residency.land(self.copies.popleft()[1])
        plan = self.scheduler.schedule(float(self.steps))
        self.copies.extend((self.steps + self.copy_steps, upload) for upload in plan.uploads)
        while not plan.sequences and self._in_flight is None and self.copies:
            self.residency.land(self.copies.popleft()[1])
            plan = self.scheduler.schedule(float(self.steps))
            self.copies.extend((self.steps + self.copy_steps, upload) for upload in plan.uploads)
        self.dispatch(plan)
        before, self._in_flight = self._in_flight, plan if plan.sequences else None
        self.steps += 1
        for sequence in before.sequences if before else ():
            request = sequence.request
            if sequence.samples and request.finish_reason is None:
                request.output.append(self.sample(request))
                if len(request.output) >= self.stop_early.get(request.number, request.max_new):
                    self.scheduler.finish(request, FinishReason.STOP, float(self.steps))
        self.scheduler.check()
        return plan

    def dispatch(self, plan: StepPlan) -> None:
        """For a device that does something."""

    def sample(self, request: Request) -> int:
        """The token that follows."""
        return 0

    def run(self, most_steps: int) -> list[StepPlan]:
        """Steps until all is finished and read."""
        plans = []
        while self.scheduler.has_work():
            assert len(plans) < most_steps, "the scheduler does not get its work done"
            plans.append(self.step())
        plans.append(self.step())
        return plans

    def assert_idle(self) -> None:
        """Nothing runs, and every page is free or idle."""
        assert not self.scheduler.running and not self.scheduler.waiting
        idle = self.evictor.pages(PageKind.ADAPTER) + self.evictor.pages(PageKind.PREFIX)
        assert self.allocator.num_free + idle == self.allocator.capacity
        assert all(not resident.users for resident in self.residency.residents)


@pytest.fixture(scope="session")
def simulate() -> type[Simulation]:
    return Simulation
