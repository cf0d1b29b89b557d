"""Requests that follow others: by hand, one user at a time, never more than the users, and Little's law."""

from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
from simulated import SHAPE, device, random_workload

from slora_jax.errors import RequestError
from slora_jax.metrics import RequestRecord
from slora_jax.scheduling import EarlyAbort, FinishReason
from slora_jax.simulation import Arrivals, SimulatedRequest, make_system, simulate

RANKS = [2, 4, 8, 2, 4, 8]
OURS = make_system("slora", page_size=8, num_tokens=2000, max_num_seqs=12, max_num_batched_tokens=64)
SYSTEMS = {
    "slora": OURS,
    "slora-paper": make_system("slora-paper", num_tokens=800, max_num_batched_tokens=100),
    "packed": make_system("packed", page_size=8, num_tokens=400, max_num_seqs=6, max_num_batched_tokens=64, replicas=6),
    "peft-paper": make_system("peft-paper", offline_batch=4),
}


def loop(seed: int, users: int, think: float = 0.0, requests: int = 60) -> list[SimulatedRequest]:
    """Each user sends every `users`-th request."""
    return [
        replace(request, arrival=0.0 if i < users else think, after=None if i < users else i - users)
        for i, request in enumerate(random_workload(seed, requests))
    ]


def run(workload, system=OURS, **settings) -> list[RequestRecord]:
    return list(simulate(workload, system, SHAPE, device(), RANKS, **settings).records)


def most_at_once(records: list[RequestRecord]) -> int:
    """Requests between their arrival and their end; who ends at a time leaves before others arrive."""
    events = [(r.arrival, 1) for r in records] + [(r.finished, -1) for r in records]
    return int(np.cumsum([change for _, change in sorted(events)]).max())


@pytest.mark.parametrize("name", SYSTEMS)
def test_each_request_arrives_thinking_seconds_after_the_one_that_it_follows_ended(name) -> None:
    for users, think in ((1, 0.0), (3, 0.25), (7, 0.01)):
        workload = loop(users, users, think)
        records = run(workload, SYSTEMS[name])
        assert [record.request_id for record in records] == [f"{i}" for i in range(len(workload))]
        assert [record.prompt_tokens for record in records] == [request.prompt_tokens for request in workload]
        assert [record.arrival for record in records[:users]] == [0.0] * users
        for before, record in zip(records, records[users:], strict=False):
            assert record.arrival == before.finished + think
        assert most_at_once(records) <= users


@pytest.mark.parametrize("name", SYSTEMS)
def test_a_single_user_has_one_request_after_the_other(name) -> None:
    records = run(loop(1, 1, 0.125), SYSTEMS[name])
    assert all(after.admitted >= after.arrival > before.finished for before, after in pairwise(records))


@pytest.mark.parametrize("name", SYSTEMS)
def test_as_many_users_as_requests_is_all_at_the_start(name) -> None:
    for users in (60, 75):
        assert run(loop(2, users), SYSTEMS[name]) == run(
            [replace(request, arrival=0.0) for request in random_workload(2)], SYSTEMS[name]
        )


def test_users_who_find_the_server_free_wait_for_nobody() -> None:
    """With every answer in by the time that the next arrives, an open loop with these arrivals is the same run."""
    workload = loop(3, 1, 1.0, requests=10)
    closed = run(workload)
    opened = run([replace(w, arrival=r.arrival, after=None) for w, r in zip(workload, closed, strict=True)])
    assert opened == closed


def test_an_open_loop_of_a_closed_loops_arrivals_is_the_same_run() -> None:
    """Under load too, if requests are renumbered in order of arrival; first come, first served knows no other."""
    workload = [replace(request, prefix=None) for request in loop(4, 20, 0.004)]
    closed = run(workload)
    order = sorted(range(len(workload)), key=lambda i: (closed[i].arrival, i))
    opened = run([replace(workload[i], arrival=closed[i].arrival, after=None) for i in order])
    assert [replace(opened[place], request_id=f"{i}") for place, i in enumerate(order)] == [closed[i] for i in order]


def test_users_whose_requests_are_given_up_go_on() -> None:
    policy = EarlyAbort(slo=0.3, margin=0.02, rule="code")
    workload = loop(5, 40, 0.05, requests=200)
    records = run(workload, policy=policy)
    aborted = [i for i, record in enumerate(records[:160]) if record.finish_reason is FinishReason.ABORT]
    assert aborted
    for i in aborted:
        assert records[i + 40].arrival == records[i].finished + 0.05


@pytest.mark.parametrize(("users", "think"), [(1, 0.0), (4, 0.05), (16, 0.0), (16, 0.2)])
def test_littles_law(users: int, think: float) -> None:
    """users = throughput x (latency + thinking), over the time in which all users are in the loop: within 5%, as those
    in the midst of a request at the end are counted whole."""
    records = run(loop(6, users, think, requests=100 * users))
    end = min(record.finished for record in records[-users:])
    counted = [record for record in records if record.finished <= end]
    throughput = len(counted) / end
    latency = np.mean([record.latency for record in counted])
    assert throughput * (latency + think) == pytest.approx(users, rel=0.05)


@pytest.mark.parametrize(
    ("arrival", "after", "message"),
    [
        (0.0, 1, r"workload\[1\].after=1: must be the number of an earlier request"),
        (0.0, -1, r"workload\[1\].after=-1"),
        (-0.1, 0, r"workload\[1\].arrival=-0.1: must be at least 0 seconds"),
        (float("nan"), 0, r"workload\[1\].arrival=nan"),
    ],
)
def test_a_loop_that_cannot_be_is_refused(arrival, after, message) -> None:
    workload = [SimulatedRequest(5.0, None, 1, 1), SimulatedRequest(arrival, None, 1, 1, after=after)]
    with pytest.raises(RequestError, match=message):
        run(workload)


def test_arrivals_at_several_servers_hear_of_ends_at_any() -> None:
    workload = [SimulatedRequest(1.0, None, 1, 1), SimulatedRequest(0.5, None, 1, 1, after=0)]
    workload += [SimulatedRequest(0.0, None, 1, 1, after=0), SimulatedRequest(1.0, None, 1, 1)]
    one, other = Arrivals.of_each(workload, [0, 1, 0, 1], 2)
    assert (one.next, other.next, list(one.until(1.0)), list(other.until(1.0))) == (1.0, 1.0, [(0, 1.0)], [(3, 1.0)])
    assert not one and not other and one.next == float("inf")
    other.ended(3, 1.5)  # nobody follows it
    one.ended(0, 2.0)
    assert (list(one.until(2.0)), list(other.until(2.25)), other.next) == ([(2, 2.0)], [], 2.5)
