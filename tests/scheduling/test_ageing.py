"""Ageing: its bound on the waiting time, and starvation without it."""

from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from slora_jax.scheduling import Ageing, Clustering, EarlyAbort, Fcfs, FinishReason, Lcfs, Policy, Vtc

INNER: dict[str, Callable[[], Policy]] = {
    "fcfs": Fcfs,
    "lcfs": Lcfs,
    "clustering": lambda: Clustering(1),
    "hard clustering": lambda: Clustering(1, hard=True),
    "vtc": lambda: Vtc({"a": 50.0}),
    "early abort": lambda: EarlyAbort(slo=200.0, rule="code"),
    "ageing": lambda: Ageing(Lcfs(), 50.0),
}
ADAPTER_PAGES = {None: 0, "a": 1, "b": 2, "c": 4}
sizes = st.tuples(st.integers(1, 20), st.integers(1, 10), st.sampled_from([None, "a", "b", "c"]))


@given(
    st.sampled_from(sorted(INNER)),
    st.lists(st.lists(sizes, max_size=3), min_size=1, max_size=40),
    st.integers(0, 30),
    st.integers(1, 5),
    st.integers(0, 12),
    st.integers(1, 4),
    st.integers(0, 15),
    st.sampled_from(["optimistic", "reserve"]),
)
def test_waiting_time_stays_within_the_bound(
    simulate, inner, arrivals, bound, max_num_seqs, extra_tokens, slots, spare, admission
) -> None:
    """A step is one second. When a request becomes old, the theorem's D gives the time of its first admission."""
    requests = [size for step in arrivals for size in step]
    pages = max((-(-(p + n - 1) // 4) + ADAPTER_PAGES[a] for p, n, a in requests), default=1) + spare
    sim = simulate(
        pages, max_num_seqs, max_num_seqs + extra_tokens, slots, Ageing(INNER[inner](), bound), admission=admission
    )
    longest = max((p + n for p, n, _ in requests), default=1)
    steps_of_one = -(-longest // (max_num_seqs + extra_tokens)) + max((n for _, n, _ in requests), default=1) + 2
    due: dict[int, float] = {}
    while arrivals or sim.scheduler.has_work():
        for prompt, new, adapter in arrivals.pop(0) if arrivals else ():
            sim.add(prompt, new, adapter, ADAPTER_PAGES[adapter])
        for request in sim.scheduler.waiting:
            old = sim.steps - request.metrics.arrival >= bound
            if old and request.number not in due and request.metrics.admitted is None:
                older = [r for r in sim.scheduler.waiting if r.number < request.number]
                group = len(older) + len(sim.scheduler.running)
                due[request.number] = request.metrics.arrival + bound + (2 * group + 1) * steps_of_one
        sim.step()
        for request in sim.scheduler.waiting:
            if request.metrics.admitted is None:
                assert sim.steps <= due.get(request.number, sim.steps), f"request {request.number} is overdue"
    sim.step()
    sim.assert_idle()
    assert all(
        r.finish_reason is FinishReason.LENGTH or (r.finish_reason is FinishReason.ABORT and inner == "early abort")
        for r in sim.requests
    )


def wait_of_rare(simulate, policy: Policy, every: int, steps: int = 300) -> float:
    """Returns the steps that one request of adapter "rare" waits while one of "popular" arrives every `every` steps,
    about as fast as they can be served, and a few of them wait."""
    sim = simulate(num_pages=100, max_num_seqs=2, max_num_batched_tokens=64, policy=policy)
    sim.add(prompt=4, new=5, adapter="popular", adapter_pages=1)  # so that the two slots are not freed together
    for step in range(steps):
        if step == 3:
            rare = sim.add(prompt=4, new=3, adapter="rare", adapter_pages=1)
        for _ in range(6 if step == 0 else step % every == every - 1):
            sim.add(prompt=4, new=3, adapter="popular", adapter_pages=1)
        sim.step()
    return (steps if rare.metrics.admitted is None else rare.metrics.admitted) - rare.metrics.arrival


@pytest.mark.parametrize(("name", "every", "older"), [("clustering", 2, 1), ("hard clustering", 2, 1), ("lcfs", 1, 8)])
def test_no_adapter_starves_with_ageing(simulate, name: str, every: int, older: int) -> None:
    """older: earlier requests that may still wait when it becomes old."""
    assert wait_of_rare(simulate, INNER[name](), every) > 290, "without ageing it starves"
    bound = 40
    assert wait_of_rare(simulate, Ageing(INNER[name](), bound), every) <= bound + 4 + 2 * older


def test_bound_of_zero_is_first_come_first_served(simulate) -> None:
    orders = []
    for policy in (Fcfs(), Ageing(Lcfs(), 0.0)):
        sim = simulate(num_pages=8, max_num_seqs=3, max_num_batched_tokens=16, policy=policy)
        for new in (9, 3, 7, 5, 9, 2):
            sim.add(prompt=6, new=new)
        plans = sim.run(most_steps=200)
        orders.append([[(s.request.number, s.start, s.count) for s in plan.sequences] for plan in plans])
    assert orders[0] == orders[1]
