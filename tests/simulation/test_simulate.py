"""The simulated server: latencies by hand, decisions of the real scheduler, conservation, and what must be monotone."""

from dataclasses import replace
from itertools import pairwise

import pytest
from fake_executor import FakeExecutor
from hypothesis import given, settings
from hypothesis import strategies as st
from simulated import EFFICIENCY, SHAPE, device, random_workload

from slora_jax.errors import ConfigError, RequestError
from slora_jax.memory import AdapterResidency, Evictor, Immediate, PageAllocator
from slora_jax.metrics import adapter_metrics, pool_use, serving_metrics
from slora_jax.scheduling import (
    AdapterUse,
    EarlyAbort,
    Fcfs,
    FinishReason,
    Lcfs,
    Request,
    RequestMetrics,
    SamplingParams,
    Vtc,
)
from slora_jax.simulation import CostModel, SimulatedRequest, StepWork, SystemConfig, make_system, simulate
from slora_jax.simulation.scheduler import SimulatedScheduler
from slora_jax.simulation.work import step_work

RANKS = [2, 4, 8, 2, 4, 8]
OURS = make_system("slora", page_size=8, num_tokens=600, max_num_seqs=12, max_num_batched_tokens=64)
PAPER = make_system("slora-paper", num_tokens=400, max_num_batched_tokens=100)
HOST = EFFICIENCY.host_step_seconds + EFFICIENCY.host_sequence_seconds  # of a step of one sequence


def costs(system: SystemConfig) -> CostModel:
    return CostModel(SHAPE, device(), system.software, system.lora)


def steps_of_one(cost: CostModel, prompt: int, output: int) -> list[float]:
    """Seconds on the device of a lone request without an adapter."""
    prefill = StepWork(
        prefill_rows=prompt, prefill_pairs=prompt * (prompt + 1) // 2, prefill_context=prompt, prompts=1, sampled=1
    )
    decode = [StepWork(decode_rows=1, decode_context=prompt + i, sampled=1) for i in range(1, output)]
    return [cost.step_seconds(work) for work in (prefill, *decode)]


def test_one_request_where_host_and_device_take_turns() -> None:
    result = simulate([SimulatedRequest(1.0, None, 20, 4)], PAPER, SHAPE, device(), [])
    seconds = steps_of_one(costs(PAPER), 20, 4)
    (record,) = result.records
    assert record.first_token_latency == pytest.approx(HOST + seconds[0], abs=1e-12)
    assert record.latency == pytest.approx(4 * HOST + sum(seconds), abs=1e-12)
    assert record.admitted == 1.0 and len(record.token_times) == 4
    assert result.counters.device_seconds == pytest.approx(sum(seconds) - 4 * EFFICIENCY.step_seconds)


def test_one_request_where_they_overlap() -> None:
    """The host's part of a step is hidden behind the step before; the device is faster here in decode, or slower."""
    for host in (1e-5, 0.5):
        slow = device().fitted("jax", host_step_seconds=host, host_sequence_seconds=0.0)
        result = simulate([SimulatedRequest(1.0, None, 20, 4)], OURS, SHAPE, slow, [])
        seconds = steps_of_one(costs(OURS), 20, 4)
        (record,) = result.records
        if host < min(seconds):  # only the first is not hidden
            assert record.latency == pytest.approx(host + sum(seconds), abs=1e-12)
        else:  # the device waits for the host; a token is read once the next step is dispatched
            assert record.first_token_latency == pytest.approx(2 * host, abs=1e-12)
            assert record.latency == pytest.approx(4 * host + seconds[3], abs=1e-12)


def reference(workload, system: SystemConfig, ranks) -> dict[int, tuple[float, float, float]]:
    """(admitted, first token, finished) of each: the scheduler driven step by step, host and device in turns, adapters
    copied on admission."""
    cost = costs(system)
    residency = AdapterResidency(Evictor(PageAllocator(system.num_tokens + 1), Immediate()), 64)
    sched = SimulatedScheduler(residency, Fcfs(), system, FakeExecutor())
    uses = [AdapterUse(str(i), str(i), SHAPE.ranks(r), 4 * r) for i, r in enumerate(ranks)]
    requests = [
        Request(str(i), i, [0] * r.prompt_tokens, SamplingParams(), 0, r.output_tokens,
                None if r.adapter is None else uses[r.adapter], RequestMetrics(r.arrival))
        for i, r in enumerate(workload)
    ]  # fmt: skip
    now, arrived = 0.0, 0
    while sched.has_work() or arrived < len(requests):
        if not sched.has_work():
            now = max(now, requests[arrived].metrics.arrival)
        while arrived < len(requests) and requests[arrived].metrics.arrival <= now:
            sched.add(requests[arrived])
            arrived += 1
        plan = sched.schedule(now)
        work = step_work(plan.sequences, {str(i): r for i, r in enumerate(ranks)})
        now += cost.host_seconds(work)
        now += sum(cost.copy_seconds(int(r.ranks.max()) * SHAPE.lora_bytes) for r in plan.loads)
        now += cost.step_seconds(work)
        for s in plan.sequences:
            if s.samples:
                s.request.output.append(0)
                s.request.metrics.first_token = s.request.metrics.first_token or now
                if len(s.request.output) == s.request.max_new:
                    sched.finish(s.request, FinishReason.LENGTH, now)
    return {r.number: (r.metrics.admitted, r.metrics.first_token, r.metrics.finished) for r in requests}


@settings(max_examples=10)
@given(seed=st.integers(0, 2**32 - 1), every=st.sampled_from([1, 4, 10]), mixed=st.booleans())
def test_it_decides_as_the_real_scheduler_driven_step_by_step(seed, every, mixed) -> None:
    system = replace(PAPER, admit_every=every, mixed=mixed)
    workload = random_workload(seed)
    expected = reference(workload, system, RANKS)
    for number, record in enumerate(simulate(workload, system, SHAPE, device(), RANKS).records):
        times = (record.admitted, record.first_token, record.finished)
        assert times == pytest.approx(expected[number], abs=1e-9), f"seed {seed}, request {number}"


@pytest.mark.parametrize("system", [OURS, PAPER], ids=["slora", "slora-paper"])
@pytest.mark.parametrize(
    "policy", [None, Lcfs(), Vtc(), EarlyAbort(slo=0.2, margin=0.02, rule="code")], ids=lambda p: type(p).__name__
)
def test_every_request_ends_once_and_the_same_run_gives_the_same_result(system, policy) -> None:
    """Pages are checked by `simulate` itself, at the end."""
    workload = random_workload(7)
    runs = [simulate(workload, system, SHAPE, device(), RANKS, policy=policy) for _ in range(2)]
    assert runs[0] == runs[1]
    result = runs[0]
    assert [r.request_id for r in result.records] == [str(i) for i in range(len(workload))]
    for request, record in zip(workload, result.records, strict=True):
        assert (record.arrival, record.prompt_tokens) == (request.arrival, request.prompt_tokens)
        if record.completed:
            assert record.output_tokens == len(record.token_times) == request.output_tokens
            assert request.arrival <= record.admitted < record.first_token <= record.finished == record.token_times[-1]
            assert list(record.token_times) == sorted(record.token_times)
        else:
            assert record.finish_reason is FinishReason.ABORT and record.request_id in result.abort_reasons
    aborted = sum(not r.completed for r in result.records)
    assert result.counters.aborts == aborted and (aborted > 0) == isinstance(policy, EarlyAbort)
    assert result.seconds == max(r.finished for r in result.records)
    computed = sum(r.prompt_tokens + r.output_tokens - 1 for r in result.records if r.completed)
    assert result.counters.tokens_computed == computed or result.counters.preemptions


def test_equal_beginnings_are_computed_once_under_each_adapter() -> None:
    """By hand: 20 of 24 tokens are shared, so 2 pages of 8; each request comes when the one before has ended."""
    system, text = replace(OURS, prefix_cache=True), (0, 20)
    workload = [SimulatedRequest(float(i), i // 2, 24, 4, prefix=text) for i in range(4)]
    workload += [SimulatedRequest(4.0, 1, 24, 4, prefix=(1, 20)), SimulatedRequest(5.0, 1, 24, 4)]
    counters = simulate(workload, system, SHAPE, device(), [2, 2]).counters
    assert (counters.prompt_tokens, counters.prefix_hit_tokens) == (6 * 24, 2 * 16)
    assert counters.tokens_computed == 6 * (24 + 3) - 2 * 16
    without = simulate(workload, replace(OURS, prefix_cache=False), SHAPE, device(), [2, 2]).counters
    assert (without.tokens_computed, without.prefix_hit_tokens) == (6 * (24 + 3), 0)


def test_a_prefix_cache_changes_nothing_for_prompts_that_share_nothing_in_a_pool_with_room() -> None:
    workload = [replace(request, prefix=None) for request in random_workload(8)]
    roomy = replace(OURS, num_tokens=20_000)
    cached, plain = (simulate(workload, system, SHAPE, device(), RANKS) for system in
                     (roomy, replace(roomy, prefix_cache=False)))  # fmt: skip
    assert cached.records == plain.records


def test_records_and_samples_are_what_the_metrics_read() -> None:
    result = simulate(random_workload(3), OURS, SHAPE, device(), RANKS, sample_seconds=0.05)
    metrics = serving_metrics(result.records, start=0.0)
    assert metrics.completed == 60 and metrics.inter_token_latency.count > 500
    assert adapter_metrics(result.records, [], 0.0, result.seconds)["0"].completed > 0
    assert pool_use(result.pool).peak["kv"] > 0.1
    assert {sample.pages.total for sample in result.pool} == {600 // 8}


@pytest.mark.parametrize("field", ["memory_bandwidth", "matmul_flops", "vector_flops", "host_to_device_bandwidth"])
@pytest.mark.parametrize("system", [OURS, PAPER], ids=["slora", "slora-paper"])
def test_a_faster_device_serves_the_workload_sooner(system, field) -> None:
    ends = [
        simulate(random_workload(5), system, SHAPE, device(**{field: factor * getattr(device(), field)}), RANKS).seconds
        for factor in (0.25, 1, 8)
    ]
    assert ends[0] >= ends[1] >= ends[2]


def test_a_lone_request_is_never_slower_on_a_faster_device() -> None:
    request = [SimulatedRequest(0.0, 0, 30, 30)]
    for system in (OURS, PAPER):
        base = simulate(request, system, SHAPE, device(), [8]).seconds
        for field in ("memory_bandwidth", "matmul_flops", "vector_flops", "host_to_device_bandwidth"):
            faster = device(**{field: 2 * getattr(device(), field)})
            assert simulate(request, system, SHAPE, faster, [8]).seconds <= base


@pytest.mark.parametrize("system", [OURS, PAPER], ids=["slora", "slora-paper"])
def test_the_same_requests_in_less_time_wait_longer_for_their_first_token(system) -> None:
    workload = random_workload(9, requests=150, rate=1.0)
    means = []
    for rate in (5.0, 20.0, 40.0, 80.0, 200.0):
        faster = [replace(r, arrival=r.arrival / rate) for r in workload]
        result = simulate(faster, system, SHAPE, device(), RANKS)
        means.append(serving_metrics(result.records).first_token_latency.mean)
    assert all(after > 0.9 * before for before, after in pairwise(means)), means
    assert means[-1] > 5 * means[0]


@pytest.mark.parametrize(
    ("workload", "adapters", "message"),
    [
        ([], [], "no requests"),
        ([SimulatedRequest(0.0, 1, 1, 1)], [8], r"workload\[0\].adapter=1: there are 1 adapters"),
        ([SimulatedRequest(1.0, None, 1, 1), SimulatedRequest(0.5, None, 1, 1)], [], r"workload\[1\].arrival=0.5"),
        ([SimulatedRequest(0.0, None, 1, 0)], [], "output_tokens=0"),
        ([SimulatedRequest(0.0, None, 4, 1, prefix=(0, 5))], [], r"prefix=\(0, 5\): must share 1 to 4 prompt"),
        ([SimulatedRequest(0.0, None, 400, 400)], [], "the request can never fit"),
    ],
)
def test_a_workload_that_cannot_be_served_is_refused(workload, adapters, message) -> None:
    with pytest.raises(RequestError, match=message):
        simulate(workload, OURS, SHAPE, device(), adapters)


@pytest.mark.parametrize(("adapters", "message"), [([0], r"adapters\[0\]=0"), ([1000], "an adapter of .* pages")])
def test_an_adapter_that_cannot_be_served_is_refused(adapters, message) -> None:
    with pytest.raises(ConfigError, match=message):
        simulate([SimulatedRequest(0.0, 0, 1, 1)], OURS, SHAPE, device(), adapters)
