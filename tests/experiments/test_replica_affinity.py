"""The ideal that adapter-aware routing is compared with."""

import pytest

from experiments.serving.replicas import ideal


@pytest.mark.parametrize(("capacity", "share"), [(2, 1.0), (1, 0.0)])
def test_an_ideal_split_gives_each_replica_half_of_the_adapters(capacity: int, share: float) -> None:
    assert ideal([0, 1, 2, 3] * 3, capacity, warm_up=4) == share


def test_the_most_popular_adapter_has_a_replica_of_its_own_before_the_others_share() -> None:
    assert ideal([0, 1, 0, 2, 0, 1, 0, 2], capacity=1, warm_up=0) == 3 / 8  # 1 and 2 evict each other
