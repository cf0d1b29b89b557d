"""The engine's loop over a fake executor: failures, cancellations, waits."""

from collections.abc import Callable

import pytest
from fake_executor import FakeExecutor
from make_request import make_request

from slora_jax.engine.core import EngineCore, Landing
from slora_jax.memory import AdapterResidency, Evictor, Lru, PageAllocator, PrefixCache
from slora_jax.scheduling import AdapterState, CoreConfig, Fcfs, FinishReason, Lcfs, Policy, Scheduler
from slora_jax.scheduling.plan import NOT_FINITE


def make_core(executor: FakeExecutor, policy: Policy | None = None, overlap: bool = True, **config) -> EngineCore:
    settings = CoreConfig(page_size=4, max_num_seqs=4, max_num_batched_tokens=32, **config)
    evictor = Evictor(PageAllocator(64), Lru())
    residency = AdapterResidency(evictor, 8)
    prefixes = PrefixCache(evictor, 4) if settings.prefix_cache else None
    scheduler = Scheduler(residency, policy or Fcfs(), settings, executor, prefixes)
    return EngineCore(scheduler, executor, lambda: float(executor.steps), overlap=overlap)


def run(core: EngineCore, most: int = 200) -> list:
    updates = []
    for _ in range(most):
        if not core.has_work:
            break
        updates += core.step()
        core.executor.steps += 1
        core.check()
    assert not core.has_work and not core.requests
    return updates


@pytest.mark.parametrize("overlap", [True, False])
def test_step_is_read_after_the_next_dispatch_with_overlap(overlap) -> None:
    core = make_core(FakeExecutor(sample=lambda request: 7), overlap=overlap)
    core.add(request := make_request(0, new=3))
    assert [len(core.step()) for _ in range(2)] == [0 if overlap else 1, 1]
    assert (core.in_flight is not None) == overlap
    run(core)
    assert request.output == [7] * 3 and request.finish_reason is FinishReason.LENGTH
    assert request.metrics.first_token == request.token_times[0] and request.metrics.finished == request.token_times[-1]
    assert core.counters.tokens_generated == 3


def test_stop_token_ends_a_request_and_the_surplus_token_is_dropped() -> None:
    core = make_core(FakeExecutor(sample=lambda request: 3))
    request = make_request(0, new=9)
    request.stop_token_ids = frozenset({3})
    core.add(request)
    updates = run(core)
    assert request.output == [3] and request.finish_reason is FinishReason.STOP
    assert [(update.token, update.ended) for update in updates] == [(3, True)]


class Failing(FakeExecutor):
    """Raises in the method `name` when `fails(argument)`."""

    def __init__(self, name: str, fails: Callable[[object], bool]) -> None:
        super().__init__()
        method = getattr(self, name)

        def failing(argument):
            if fails(argument):
                raise RuntimeError("on fire")
            return method(argument)

        setattr(self, name, failing)


def test_failed_dispatch_ends_its_requests_and_drops_its_adapters() -> None:
    executor = Failing("dispatch", lambda plan: any(s.request.number == 0 for s in plan.sequences))
    core = make_core(executor, prefetch=0)
    core.add(bad := make_request(0, prompt=32, adapter="a"))  # a whole step
    core.add(good := make_request(1, adapter="a"))
    with pytest.raises(RuntimeError, match="on fire"):
        core.step()
    assert "a" not in core.scheduler.residency and len(core.scheduler.prefixes.pages()) == 0
    updates = run(core)
    assert bad.finish_reason is FinishReason.ERROR and good.finish_reason is FinishReason.LENGTH
    assert "the step failed: RuntimeError('on fire')" in updates[0].error
    assert executor.uploaded == ["a", "a"]


def test_failed_stage_ends_requests_of_its_adapter_only() -> None:
    executor = Failing("stage", lambda upload: upload.resident.digest == "bad" and upload.first > 0)
    core = make_core(executor, upload_pages_per_step=2)
    requests = {
        name: make_request(number, adapter=name, adapter_pages=5) for number, name in enumerate(("bad", "good", None))
    }
    for request in requests.values():
        core.add(request)
    updates = run(core)
    reasons = {name: request.finish_reason for name, request in requests.items()}
    assert reasons == {"bad": FinishReason.ERROR, "good": FinishReason.LENGTH, None: FinishReason.LENGTH}
    (error,) = [update.error for update in updates if update.error]
    assert error.startswith("adapter 'bad': content bad could not be copied to the device: RuntimeError")
    assert "bad" not in core.scheduler.residency and not executor.copies


def test_failed_copy_ends_requests_of_its_adapter_only() -> None:
    executor = FakeExecutor()
    landed = executor.landed
    executor.landed = lambda: [
        Landing(upload, "INTERNAL" if upload.resident.digest == "bad" else None) for upload, _ in landed()
    ]
    core = make_core(executor)
    core.add(bad := make_request(0, adapter="bad"))
    core.add(good := make_request(1, adapter="good"))
    run(core)
    assert (bad.finish_reason, good.finish_reason) == (FinishReason.ERROR, FinishReason.LENGTH)


def test_lost_adapter_ends_its_waiting_requests_only() -> None:
    def state(digest: str) -> AdapterState:
        if digest != "lost":
            return AdapterState.READY
        executor.lost_adapters[digest] = "its file is gone"
        return AdapterState.FAILED

    executor = FakeExecutor(state=state)
    core = make_core(executor)
    core.add(lost := make_request(0, adapter="lost"))
    core.add(other := make_request(1, adapter="other"))
    updates = run(core)
    assert lost.finish_reason is FinishReason.ERROR and other.finish_reason is FinishReason.LENGTH
    assert [update.error for update in updates if update.error] == ["adapter 'lost': its file is gone"]


def test_logits_that_are_not_finite_end_the_request_and_drop_its_adapters_prefixes() -> None:
    core = make_core(FakeExecutor(sample=lambda request: NOT_FINITE if request.number == 0 else 1))
    core.add(make_request(0, prompt=9, new=3, adapter="a"))
    core.add(fine := make_request(1, prompt=9, new=3))
    updates = run(core)
    (error,) = [update.error for update in updates if update.error]
    assert error == "adapter 'a': the logits of output token 0 are not finite (NaN or infinity)"
    assert fine.finish_reason is FinishReason.LENGTH
    assert core.scheduler.prefixes.match("a", bytes(4 * 8), 2) is None
    assert core.scheduler.prefixes.match(None, bytes(4 * 8), 2) is not None


class CountingGrammar:
    """Is complete after three tokens; a token 9 fails."""

    read = 0

    @property
    def is_complete(self) -> bool:
        return self.read == 3

    def accept(self, token: int) -> str | None:
        self.read += 1
        return "too complex" if token == 9 else None


def test_complete_grammar_stops_its_request_and_a_failed_one_ends_it_with_an_error() -> None:
    core = make_core(FakeExecutor(sample=lambda request: 9 if request.number == 1 else 5))
    requests = [make_request(number, new=9) for number in range(3)]
    for request in requests:
        request.grammar = CountingGrammar() if request.number < 2 else None
        core.add(request)
    updates = run(core)
    reasons = [FinishReason.STOP, FinishReason.ERROR, FinishReason.LENGTH]
    assert [request.finish_reason for request in requests] == reasons
    assert [len(request.output) for request in requests] == [3, 0, 9]
    assert [update.error for update in updates if update.error] == ["too complex"]


@pytest.mark.parametrize(("policy", "first"), [(Fcfs(), "old"), (Lcfs(), "new")])
def test_idle_step_waits_for_the_adapter_that_the_policy_admits_next(policy, first) -> None:
    executor = FakeExecutor(state=lambda digest: AdapterState.LOADING)
    waited: list[str | None] = []
    executor.wait = waited.append
    core = make_core(executor, policy)
    core.add(make_request(0, adapter="old"))
    core.add(make_request(1, adapter="new"))
    core.step()
    assert waited == [first]


def test_idle_step_waits_for_the_oldest_copy() -> None:
    executor = FakeExecutor(copy_steps=10**6)
    core = make_core(executor)
    core.add(request := make_request(0, adapter="a"))
    run(core)
    assert request.finish_reason is FinishReason.LENGTH


def test_a_request_ends_once() -> None:
    core = make_core(FakeExecutor())
    core.add(request := make_request(0))
    core.step()
    core.finish(request, FinishReason.CANCELLED)
    core.finish(request, FinishReason.ERROR)
    assert request.finish_reason is FinishReason.CANCELLED and not core.requests
    assert run(core) == []
