"""Early abort: its set and its optimality against exhaustive search, and the code rule against the paper's code."""

from itertools import combinations, permutations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from slora_jax.scheduling import EarlyAbort, Fcfs, FinishReason
from slora_jax.scheduling.early_abort import latest_servable

ages = st.lists(st.integers(0, 12), max_size=6).map(lambda values: sorted(-a for a in values))  # arrivals, now = 0


def first_tokens(count: int, margin: float, each: float) -> list[float]:
    """Returns the times of the first tokens, in the order of service from time 0."""
    return [margin + j * each for j in range(count)]


@given(ages, st.integers(1, 12), st.integers(0, 4), st.integers(1, 5))
def test_latest_servable_set_is_the_largest_of_all_sets_and_orders(arrivals, slo, margin, each) -> None:
    """Exhaustive search over all sets and orders of at most six requests."""

    def in_time(order: tuple[float, ...]) -> bool:
        return all(t - a <= slo for t, a in zip(first_tokens(len(order), margin, each), order, strict=True))

    most = max(
        size
        for size in range(len(arrivals) + 1)
        if any(in_time(order) for chosen in combinations(arrivals, size) for order in permutations(chosen))
    )
    servable = latest_servable(arrivals, 0.0, slo, margin, each)
    assert servable == most
    assert in_time(tuple(arrivals[len(arrivals) - servable :])), "the latest, in order of arrival, are in time"


rewards = st.one_of(
    st.integers(1, 20).map(lambda slo: lambda latency: float(latency <= slo)),  # attainment
    st.integers(1, 20).map(lambda slo: lambda latency: max(0.0, 1 - (latency / slo) ** 2)),  # satisfaction
    st.lists(st.integers(0, 9), min_size=40, max_size=40).map(  # any that does not increase
        lambda steps: lambda latency: float(sum(steps[int(latency) :]))
    ),
)


@given(ages, rewards, st.lists(st.integers(0, 20), min_size=6, max_size=6), st.data())
def test_serving_the_latest_maximises_every_nonincreasing_reward(ages, reward, times, data) -> None:
    """Theorem B.1, by exhaustive search: l requests can be served, at given times; no l beat the latest l."""
    count = data.draw(st.integers(0, len(ages)))
    times = sorted(times)[:count]

    def best(requests: list[float]) -> float:
        return max(
            sum(reward(t - a) for t, a in zip(times, order, strict=True)) for order in permutations(requests, count)
        )

    assert best(ages[len(ages) - count :]) == pytest.approx(best(ages))


def overload(simulate, policy):
    """Runs one slot with a request per step, each of three steps, for 120 steps; then to the end. A step is a
    second."""
    sim = simulate(num_pages=20, max_num_seqs=1, max_num_batched_tokens=16, policy=policy)
    for _ in range(120):
        sim.add(prompt=4, new=2)
        sim.step()
    while sim.scheduler.has_work():
        sim.step()
    sim.step()
    sim.assert_idle()
    return sim


def test_early_abort_under_overload_serves_in_time_and_aborts_the_rest(simulate) -> None:
    slo = 12
    plain, early = (overload(simulate, policy) for policy in (Fcfs(), EarlyAbort(slo=slo)))

    def in_time(sim) -> int:
        return sum(
            r.metrics.admitted is not None and r.metrics.admitted - r.metrics.arrival < slo for r in sim.requests
        )

    served = [r for r in early.requests if r.finish_reason is FinishReason.LENGTH]
    assert in_time(early) == len(served), "every served request is in time"
    possible = 120 // 3
    assert in_time(early) >= 0.9 * possible
    assert in_time(plain) < 0.5 * possible, "first come, first served falls behind"
    assert early.counters.aborts == 120 - len(served)
    assert all(r.metrics.first_token is None and not r.output for r in early.requests if r not in served)


def test_early_abort_aborts_nothing_without_overload(simulate) -> None:
    sim = simulate(num_pages=200, max_num_seqs=8, max_num_batched_tokens=64, policy=EarlyAbort(slo=30))
    for _ in range(10):
        for _ in range(8):
            sim.add(prompt=4, new=2)
        for _ in range(4):
            assert not sim.step().aborted
    sim.run(most_steps=100)
    assert sim.counters.aborts == 0


def test_abort_reasons_state_waiting_time_and_admission_rate(simulate) -> None:
    sim = simulate(num_pages=30, max_num_seqs=1, max_num_batched_tokens=16, policy=EarlyAbort(slo=10))
    sim.add(prompt=4, new=90)
    sim.step()
    for _ in range(3):
        sim.add(prompt=4, new=9)
    reasons = {request.number: reason for _ in range(15) for request, reason in sim.step().aborted}
    assert set(reasons) == {1, 2, 3}
    assert "one request is admitted in" in reasons[1] and "slo=10 s" in reasons[1]
    assert reasons[3] == "early abort: waited 10 s; its first token would not come within slo=10 s"


def test_request_with_a_token_is_never_aborted(simulate) -> None:
    sim = simulate(num_pages=5, max_num_seqs=2, max_num_batched_tokens=16, policy=EarlyAbort(slo=2, margin=0))
    first, second = sim.add(prompt=8, new=9), sim.add(prompt=8, new=9)
    sim.run(most_steps=60)
    assert second.metrics.preemptions and second.metrics.admitted == 0.0
    assert first.finish_reason is second.finish_reason is FinishReason.LENGTH


class AbortReqQueue:
    """S-LoRA's `abort_req_queue.py` line by line, except for room in the batch. The newest requests are in front."""

    def __init__(self, slo: float) -> None:
        self.slo = slo
        self.waiting: list[tuple[int, float]] = []
        self.rate = self.size = 1
        self.last = 0

    def attempt(self, now: float, room: int) -> tuple[list[int], list[int]]:
        """Returns the numbers of aborted and of admitted requests."""
        self.rate = int(0.7 * (len(self.waiting) - self.last) + 0.3 * self.rate)
        aborted = [number for number, arrival in self.waiting if now - arrival + 0.5 >= self.slo]
        self.waiting = [one for one in self.waiting if one[0] not in aborted]
        order = self.waiting if self.rate >= self.size else self.waiting[::-1]
        admitted = [number for number, _ in order[:room]]
        if admitted:
            self.waiting = [one for one in self.waiting if one[0] not in admitted]
            self.last = len(self.waiting)
            self.size = max(int(0.7 * len(admitted) + 0.3 * self.size), 1)
        return aborted, admitted


@given(st.lists(st.integers(0, 6), max_size=40), st.integers(1, 4), st.integers(1, 5), st.integers(2, 15))
def test_code_rule_agrees_with_the_papers_code(simulate, bursts, max_num_seqs, new, slo) -> None:
    sim = simulate(
        num_pages=200, max_num_seqs=max_num_seqs, max_num_batched_tokens=64, policy=EarlyAbort(slo=slo, rule="code")
    )
    code = AbortReqQueue(slo)
    for burst in bursts:
        for _ in range(burst):
            request = sim.add(prompt=2, new=new)
            code.waiting.insert(0, (request.number, request.metrics.arrival))
        now, room = sim.steps, max_num_seqs - len(sim.scheduler.running)
        plan = sim.step()
        aborted, admitted = code.attempt(now, room)
        assert sorted(r.number for r, _ in plan.aborted) == sorted(aborted)
        assert [s.request.number for s in plan.sequences if s.start == 0] == admitted
