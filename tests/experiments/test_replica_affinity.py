import numpy as np
import pytest

from experiments.replica_affinity import Settings, ideal


@pytest.mark.parametrize(("capacity", "share"), [(2, 1.0), (1, 0.0)])
def test_an_ideal_split_gives_each_replica_half_of_the_adapters(capacity: int, share: float) -> None:
    settings = Settings(adapters=4, warmup=4, requests=8)
    assert ideal([0, 1, 2, 3] * 3, np.full(4, 0.25), capacity, settings) == share


def test_an_ideal_split_gives_a_hot_adapter_a_replica_of_its_own() -> None:
    settings = Settings(adapters=3, warmup=3, requests=6)
    # 1 and 2 take turns in the other replica's only place.
    assert ideal([0, 1, 2, 0, 1, 0, 2, 0, 1], np.array([0.6, 0.2, 0.2]), 1, settings) == 3 / 6


@pytest.mark.parametrize("popularity", ["zipf", "uniform", "hot"])
def test_requests_are_drawn_by_popularity(popularity: str) -> None:
    settings = Settings(requests=20_000)
    found = np.bincount(settings.draw(popularity), minlength=settings.adapters) / (20_000 + settings.warmup)
    assert np.abs(found - settings.shares(popularity)).max() < 0.02
    assert settings.shares(popularity).sum() == pytest.approx(1)
