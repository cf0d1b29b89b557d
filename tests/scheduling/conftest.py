"""The engine's core over a fake executor: requests of any size, tokens one step late, copies that take their time."""

from collections.abc import Callable
from dataclasses import replace

import pytest
from fake_executor import FakeExecutor, FakeStep
from make_request import make_request

from slora_jax.engine.core import EngineCore
from slora_jax.engine.trace import NoTrace
from slora_jax.memory import AdapterResidency, EvictionPolicy, Evictor, Lru, PageAllocator, PageKind, PrefixCache
from slora_jax.scheduling import AdapterState, CoreConfig, Fcfs, Policy, Request, Scheduler, StepPlan

PAGE_SIZE = 4
STOP = 10**6
"""A token that ends a request."""


class Recorder(NoTrace):
    """The newest plan, with the uploads that the core takes out of it."""

    plan: StepPlan

    def planned(self, plan: StepPlan, scheduler: Scheduler) -> None:
        self.plan = replace(plan, uploads=list(plan.uploads))


class Simulation(FakeExecutor):
    """Steps a core. copy_steps: after how many steps an upload has landed; when nothing runs, the oldest lands at
    once."""

    def __init__(
        self,
        num_pages: int,
        max_num_seqs: int,
        max_num_batched_tokens: int,
        adapter_slots: int = 64,
        policy: Policy | None = None,
        adapter_state: Callable[[str], AdapterState] = lambda digest: AdapterState.READY,
        admission: str = "optimistic",
        adapter_pages: int | None = None,
        eviction: EvictionPolicy | None = None,
        prefetch: int = 0,
        upload_pages_per_step: int = 8,
        copy_steps: int = 1,
        prefix_cache: bool = False,
    ) -> None:
        super().__init__(self.token, copy_steps, adapter_state)
        self.allocator = PageAllocator(num_pages + 1, adapter_pages)
        self.evictor = Evictor(self.allocator, eviction or Lru())
        self.residency = AdapterResidency(self.evictor, adapter_slots)
        self.prefixes = PrefixCache(self.evictor, PAGE_SIZE) if prefix_cache else None
        config = CoreConfig(
            PAGE_SIZE,
            max_num_seqs,
            max_num_batched_tokens,
            admission,
            prefetch=prefetch,
            upload_pages_per_step=upload_pages_per_step,
        )
        self.scheduler = Scheduler(self.residency, policy or Fcfs(), config, self, self.prefixes)
        self.core = EngineCore(self.scheduler, self, lambda: float(self.steps))
        self.core.trace = self.recorder = Recorder()
        self.counters = self.core.counters
        self.requests: list[Request] = []
        self.stop_early: dict[int, int] = {}  # request number -> output tokens after which it meets a stop token

    def add(
        self, prompt: int | list[int], new: int, adapter: str | None = None, adapter_pages: int = 0, tenant: str = ""
    ) -> Request:
        """A request of `prompt` tokens (their number, or their ids) that may generate `new`, with an adapter of
        `adapter_pages`."""
        request = make_request(len(self.requests), float(self.steps), prompt, new, adapter, adapter_pages, tenant)
        request.stop_token_ids = frozenset({STOP})
        self.requests.append(request)
        self.core.add(request)
        return request

    def step(self) -> StepPlan:
        self.core.step()
        self.steps += 1
        self.core.check()
        return self.recorder.plan

    def dispatch(self, plan: StepPlan) -> FakeStep:
        self.execute(plan)
        return super().dispatch(plan)

    def execute(self, plan: StepPlan) -> None:
        """For a device that does something."""

    def token(self, request: Request) -> int:
        """The token that follows."""
        if len(request.output) + 1 == self.stop_early.get(request.number):
            return STOP
        return self.following(request.prompt + request.output)

    @staticmethod
    def following(tokens: list[int]) -> int:
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
        assert not self.core.requests and not self.scheduler.has_work() and not self.residency.users
        idle = self.evictor.pages(PageKind.ADAPTER) + self.evictor.pages(PageKind.PREFIX)
        assert self.allocator.num_free + idle == self.allocator.capacity


@pytest.fixture(scope="session")
def simulate() -> type[Simulation]:
    return Simulation
