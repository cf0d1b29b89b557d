"""The engine's core over a fake executor: requests of any size, tokens one step late, copies that take steps."""

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
"""Stop token of every request."""


class Recorder(NoTrace):
    """Keeps the newest plan, with the uploads that the core removes from it."""

    plan: StepPlan

    def planned(self, plan: StepPlan, scheduler: Scheduler) -> None:
        self.plan = replace(plan, uploads=list(plan.uploads))


class Simulation(FakeExecutor):
    """Steps a core. copy_steps: steps until an upload has landed; if nothing runs, the oldest lands at once."""

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
        self.stop_early: dict[int, int] = {}  # request number -> output tokens up to its stop token

    def add(
        self, prompt: int | list[int], new: int, adapter: str | None = None, adapter_pages: int = 0, tenant: str = ""
    ) -> Request:
        """Adds a request of `prompt` tokens (a count, or ids) and at most `new` output tokens, with an adapter of
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
        places = [
            (s.request.pages[at // PAGE_SIZE], at % PAGE_SIZE)
            for s in plan.sequences
            for at in range(s.start, s.start + s.count)
        ]
        assert len(set(places)) == len(places), "write_kv needs distinct places"
        self.execute(plan)
        return super().dispatch(plan)

    def execute(self, plan: StepPlan) -> None:
        """Hook for subclasses that simulate the device."""

    def token(self, request: Request) -> int:
        """Returns the next token of a request."""
        if len(request.output) + 1 == self.stop_early.get(request.number):
            return STOP
        return self.following(request.prompt + request.output)

    @staticmethod
    def following(tokens: list[int]) -> int:
        return 0

    def run(self, most_steps: int) -> list[StepPlan]:
        """Steps until all requests have ended and the last step is read. Returns the plans."""
        plans = []
        while self.scheduler.has_work():
            assert len(plans) < most_steps, "the scheduler makes no progress"
            plans.append(self.step())
        plans.append(self.step())
        return plans

    def assert_idle(self) -> None:
        """Checks that no request is unfinished and every page is free or idle."""
        assert not self.core.requests and not self.scheduler.has_work() and not self.residency.users
        idle = self.evictor.pages(PageKind.ADAPTER) + self.evictor.pages(PageKind.PREFIX)
        assert self.allocator.num_free + idle == self.allocator.capacity


@pytest.fixture(scope="session")
def simulate() -> type[Simulation]:
    return Simulation
