"""Admission at every n-th step, and prefill in steps of its own: S-LoRA's loop, spelled out."""

import pytest
from fake_executor import FakeExecutor
from hypothesis import given, settings
from hypothesis import strategies as st
from make_request import make_request

from slora_jax.engine.core import EngineCore
from slora_jax.errors import ConfigError, RequestError
from slora_jax.memory import AdapterResidency, Evictor, Immediate, PageAllocator
from slora_jax.scheduling import Fcfs
from slora_jax.simulation import make_system
from slora_jax.simulation.scheduler import SimulatedScheduler


def made(admit_every: int, mixed: bool, pages: int = 500) -> EngineCore:
    system = make_system(
        "slora-paper", max_num_batched_tokens=40, max_num_seqs=64, admit_every=admit_every, mixed=mixed
    )
    residency = AdapterResidency(Evictor(PageAllocator(pages + 1), Immediate()), 64)
    executor = FakeExecutor()
    scheduler = SimulatedScheduler(residency, Fcfs(), system, executor)
    return EngineCore(scheduler, executor, lambda: float(executor.steps), overlap=False)


def drive(core: EngineCore, arrivals: list[tuple[int, int, int]]) -> list[tuple[str, list[int]]]:
    """Steps until all is served; arrivals are (step, prompt, new). Returns the kind of each step, prefill or decode,
    and its requests."""
    requests = [make_request(i, float(step), prompt, new) for i, (step, prompt, new) in enumerate(arrivals)]
    log: list[tuple[str, list[int]]] = []
    executor = core.executor
    dispatch = executor.dispatch

    def logged(plan):
        starts = {s.start == 0 for s in plan.sequences}
        kind = "prefill" if starts == {True} else "decode" if starts == {False} else "mixed"
        log.append((kind, [s.request.number for s in plan.sequences]))
        return dispatch(plan)

    executor.dispatch = logged
    for step in range(5000):
        executor.steps = step
        for request in requests:
            if request.metrics.arrival == step:
                core.add(request)
        core.step()
        core.check()
        if all(r.finish_reason for r in requests):
            return log
    raise AssertionError("the scheduler does not get its work done")


def code(
    arrivals: list[tuple[int, int, int]], every: int, tokens: int, max_num_batched_tokens: int
) -> list[tuple[str, list[int]]]:
    """S-LoRA's `RouterManager._step` and `ReqQueue.generate_new_batch`, without adapters, with our formula of admission
    (`test_reservation` compares it with the code's)."""
    requests = [{"n": i, "at": a, "in": p, "out": o, "done": 0} for i, (a, p, o) in enumerate(arrivals)]
    queue: list[dict] = []
    running: list[dict] = []
    log: list[tuple[str, list[int]]] = []
    waited, step = 0, 0

    def fits(batch: list[dict]) -> bool:
        pairs = sorted(((r["in"] + max(r["done"] - 1, 0), r["out"] - max(r["done"] - 1, 0)) for r in batch),
                       key=lambda pair: -pair[1])  # fmt: skip
        used = 0
        for i, (has, left) in enumerate(pairs, 1):
            used += has
            if left * i + used > tokens and len(batch) > 1:
                return False
        return True

    while any(r["done"] < r["out"] for r in requests):
        queue += [r for r in requests if r["at"] == step]
        new: list[dict] = []
        if not running or waited >= every:
            for r in queue:
                if not fits(running + new + [r]) or sum(x["in"] for x in new) + r["in"] > max_num_batched_tokens:
                    break
                new.append(r)
        if new:
            queue = queue[len(new) :]
            log.append(("prefill", [r["n"] for r in new]))
            waited = 0
            batch, running = new, running + new
        else:
            if running:
                log.append(("decode", [r["n"] for r in running]))
            waited += 1
            batch = running
        for r in batch:
            r["done"] += 1
        running = [r for r in running if r["done"] < r["out"]]
        step += 1
    return log


arrivals = st.lists(st.tuples(st.integers(0, 30), st.integers(2, 30), st.integers(1, 11)), min_size=1, max_size=20)


@settings(max_examples=100)
@given(arrivals, st.integers(2, 10), st.integers(40, 120))
def test_it_is_the_loop_of_the_code(requests, every, tokens) -> None:
    requests = sorted(requests, key=lambda r: r[0])
    ours = drive(made(every, mixed=False, pages=tokens), requests)
    assert ours == code(requests, every, tokens, max_num_batched_tokens=40)


def test_a_mixed_step_admits_at_every_nth_step_too() -> None:
    log = drive(made(3, mixed=True), [(0, 4, 30), (1, 4, 2), (2, 4, 2), (9, 4, 2)])
    joined = {n: next(i for i, (_, numbers) in enumerate(log) if n in numbers) for n in range(4)}
    assert joined == {0: 0, 1: 3 + 1, 2: 3 + 1, 3: 9}


def test_with_prefill_alone_a_prompt_runs_whole_or_waits() -> None:
    log = drive(made(1, mixed=False), [(0, 30, 3), (0, 20, 3), (0, 10, 3)])
    assert log[:3] == [("prefill", [0]), ("prefill", [1, 2]), ("decode", [0, 1, 2])]


def test_a_request_too_long_for_one_step_is_refused_where_prompts_run_whole() -> None:
    with pytest.raises(RequestError, match="41 tokens .* max_num_batched_tokens=40; raise that, or set mixed=True"):
        made(1, mixed=False).add(make_request(0, prompt=40, new=2))
    made(1, mixed=True).add(make_request(0, prompt=40, new=2))


@pytest.mark.parametrize("every", [0, -1, 1.5, True])
def test_admit_every_is_validated(every) -> None:
    with pytest.raises(ConfigError, match="admit_every"):
        make_system("slora-paper", admit_every=every)
