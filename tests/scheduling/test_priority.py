"""Priorities of requests: lower numbers first."""

import pytest
from make_request import make_request

from slora_jax import ConfigError
from slora_jax.engine.arrival import check_priority
from slora_jax.scheduling import Ageing, Batch, Fcfs, Priority, RequestQueue


def test_lower_numbers_come_first_and_equals_in_order_of_arrival() -> None:
    requests = [make_request(number) for number in range(5)]
    for request, priority in zip(requests, (2, 0, -1, 0, 2), strict=True):
        request.priority = priority
    selected = Priority().select(RequestQueue(requests), Batch([], {}), 0.0)
    assert [request.number for request in selected] == [2, 1, 3, 0, 4]
    assert [request.number for request in Priority().order(requests, 0.0)] == [2, 1, 3, 0, 4]


def test_policy_that_ignores_priorities_refuses_them() -> None:
    check_priority(0, Fcfs())
    for policy in (Priority(), Ageing(Priority(), 1.0)):
        check_priority(-3, policy)
    for policy in (Fcfs(), Ageing(Fcfs(), 1.0)):
        with pytest.raises(ConfigError, match="priority=2: must be 0"):
            check_priority(2, policy)
