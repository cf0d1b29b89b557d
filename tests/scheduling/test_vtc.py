"""VTC compared with its published algorithm and fairness bound."""

from collections import defaultdict
from itertools import combinations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from slora_jax.scheduling import Fcfs, Policy, Vtc

TENANTS = "fgh"


class Published:
    """Algorithm 2 of arXiv 2401.00588 with weights (section 4.3), on lists."""

    def __init__(self, weights: dict[str, float], input_price: float, output_price: float) -> None:
        self.weights, self.prices = weights, (input_price, output_price)
        self.counter = dict.fromkeys(TENANTS, 0.0)
        self.queue: list = []
        self.last_left = None

    def arrive(self, request) -> None:
        u = request.tenant
        if not any(r.tenant == u for r in self.queue):
            if not self.queue:
                if self.last_left is not None:
                    self.counter[u] = max(self.counter[u], self.counter[self.last_left])
            else:
                self.counter[u] = max(self.counter[u], min(self.counter[r.tenant] for r in self.queue))
        self.queue.append(request)

    def admit(self):
        k = min(self.queue, key=lambda r: (self.counter[r.tenant], r.number)).tenant
        request = next(r for r in self.queue if r.tenant == k)
        self.counter[k] += self.prices[0] * len(request.prompt) / self.weights.get(k, 1)
        self.queue.remove(request)
        self.last_left = k
        return request

    def decode(self, sampled) -> None:
        for request in sampled:
            self.counter[request.tenant] += self.prices[1] / self.weights.get(request.tenant, 1)


sizes = st.tuples(st.sampled_from(TENANTS), st.integers(1, 20), st.integers(1, 12))
weights = st.dictionaries(st.sampled_from(TENANTS), st.sampled_from([0.5, 2.0, 3.0]))


@given(st.lists(st.lists(sizes, max_size=4), max_size=20), weights, st.sampled_from([(1, 2), (1, 1), (3, 0.5)]))
def test_vtc_admits_as_the_published_algorithm(simulate, arrivals, weights, prices) -> None:
    policy, published = Vtc(weights, *prices), Published(weights, *prices)
    sim = simulate(num_pages=24, max_num_seqs=4, max_num_batched_tokens=200, policy=policy, admission="reserve")
    while arrivals or sim.scheduler.has_work():
        for tenant, prompt, new in arrivals.pop(0) if arrivals else ():
            published.arrive(sim.add(prompt, new, tenant=tenant))
        plan = sim.step()
        admitted = [s.request for s in plan.sequences if s.start == 0]
        assert admitted == [published.admit() for _ in admitted]
        published.decode([s.request for s in plan.sequences if s.samples])
        assert policy.counters == pytest.approx({t: published.counter[t] for t in policy.counters})
    assert sim.counters.preemptions == 0


def widest_gaps(sim, arrivals, weights, prices) -> tuple[float, float]:
    """Runs a workload. Returns the largest difference of two tenants' weighted service over an interval in which both
    had waiting requests throughout, and the published bound on it."""
    service = defaultdict(float)
    spells: dict[tuple[str, str], tuple[float, float]] = {}  # pair -> range of their difference in this interval
    widest, most_tokens, longest_prompt = 0.0, 0, 0

    def look() -> None:
        nonlocal widest
        backlogged = sim.scheduler.waiting.by_tenant
        for pair in combinations(TENANTS, 2):
            if not all(tenant in backlogged for tenant in pair):
                spells.pop(pair, None)
                continue
            difference = service[pair[0]] - service[pair[1]]
            low, high = spells.get(pair, (difference, difference))
            spells[pair] = low, high = min(low, difference), max(high, difference)
            widest = max(widest, high - low)

    while arrivals or sim.scheduler.has_work():
        for tenant, prompt, new in arrivals.pop(0) if arrivals else ():
            sim.add(prompt, new, tenant=tenant)
            longest_prompt = max(longest_prompt, prompt)
        look()
        plan = sim.step()
        for sequence in plan.sequences:
            request = sequence.request
            gained = prices[1] * sequence.samples + (prices[0] * len(request.prompt) if sequence.start == 0 else 0)
            service[request.tenant] += gained / weights.get(request.tenant, 1)
        held = {s.request for s in plan.sequences} | set(sim.scheduler.running)
        most_tokens = max(most_tokens, sum(len(r.prompt) + r.max_new for r in held))
        look()
    least = min(weights.get(tenant, 1) for tenant in TENANTS)
    parts = prices[0] * longest_prompt, prices[1] * most_tokens
    return widest, 2 * (max(parts) if prices[0] <= prices[1] else sum(parts)) / least


@given(
    st.lists(sizes, min_size=10, max_size=60),
    st.lists(st.lists(sizes, max_size=4), max_size=20),
    weights,
    st.sampled_from([(1, 2), (1, 1), (0.5, 3), (4, 0.5)]),
    st.integers(10, 40),
    st.integers(2, 8),
)
def test_service_of_backlogged_tenants_stays_within_the_published_bound(
    simulate, burst, arrivals, weights, prices, num_pages, max_num_seqs
) -> None:
    """|W_f - W_g| <= 2 max(w_p L_input, w_q M) over every interval in which both have waiting requests. The published
    proof assumes that output costs at least as much as input; otherwise the sum replaces the maximum."""
    policy = Vtc(weights, *prices)
    sim = simulate(num_pages, max_num_seqs, max_num_batched_tokens=400, policy=policy, admission="reserve")
    widest, bound = widest_gaps(sim, [burst, *arrivals], weights, prices)
    assert widest <= bound


@pytest.mark.parametrize(("policy", "fair"), [(Vtc(), True), (Fcfs(), False)])
def test_fcfs_breaks_the_bound_when_one_tenant_floods_the_queue(simulate, policy: Policy, fair: bool) -> None:
    sim = simulate(num_pages=20, max_num_seqs=2, max_num_batched_tokens=64, policy=policy, admission="reserve")
    widest, bound = widest_gaps(sim, [[("f", 8, 8)] * 40 + [("g", 8, 8)] * 40], {}, (1, 2))
    assert (widest <= bound) is fair


def test_service_follows_the_weights(simulate) -> None:
    policy = Vtc({"f": 3.0})
    sim = simulate(num_pages=20, max_num_seqs=2, max_num_batched_tokens=64, policy=policy, admission="reserve")
    for tenant in "fg" * 100:
        sim.add(8, 8, tenant=tenant)
    served = {"f": 0, "g": 0}
    while all(tenant in sim.scheduler.waiting.by_tenant for tenant in "fg"):
        for sequence in sim.step().sequences:
            served[sequence.request.tenant] += sequence.samples
    assert served["f"] / served["g"] == pytest.approx(3, rel=0.1)


def test_idle_tenant_accumulates_no_credit(simulate) -> None:
    policy = Vtc()
    sim = simulate(num_pages=20, max_num_seqs=1, max_num_batched_tokens=64, policy=policy)
    for _ in range(20):
        sim.add(4, 4, tenant="busy")
    for _ in range(50):
        sim.step()
    sim.add(4, 4, tenant="late")
    assert policy.counters["late"] == policy.counters["busy"] > 0


def test_preempted_request_is_charged_once(simulate) -> None:
    policy = Vtc()
    sim = simulate(num_pages=5, max_num_seqs=2, max_num_batched_tokens=16, policy=policy)
    for tenant in "fg":
        sim.add(prompt=8, new=9, tenant=tenant)
    sim.run(most_steps=40)
    assert sim.counters.preemptions
    assert policy.counters == {"f": 8 + 2 * 9, "g": 8 + 2 * 9}
