"""Metrics per adapter and of the pool, compared with values by hand and by brute force."""

import pytest

from slora_jax.errors import MetricsError
from slora_jax.metrics import PoolPages, PoolSample, PoolStay, RequestRecord, adapter_metrics, pool_use
from slora_jax.scheduling import FinishReason


def record(adapter, arrival, admitted, reason=FinishReason.STOP):
    return RequestRecord("r", adapter, 4, 4, reason, arrival, arrival + 9, admitted, first_token=arrival + 8)


RECORDS = [
    record("a", 0.0, 2.0),
    record("a", 1.0, 5.0),
    record(None, 0.0, 0.5),
    record("lost", 3.0, None, FinishReason.ERROR),
]
STAYS = [
    PoolStay("a", "da", pages=4, loaded=2.0, evicted=4.0),
    PoolStay("a", "da", pages=4, loaded=5.0),  # to the end
    PoolStay("b", "db", pages=2, loaded=None, evicted=3.0),  # from before the beginning
    PoolStay("b", "db", pages=2, loaded=99.0),  # after the end
]


def test_adapters_by_hand() -> None:
    by_name = adapter_metrics(RECORDS, STAYS, start=1.0, end=10.0)
    assert list(by_name) == [None, "a", "b", "lost"]
    a, b, lost = by_name["a"], by_name["b"], by_name["lost"]
    assert (a.requests, a.completed, a.loads, a.evictions) == (2, 2, 2, 1)
    assert (a.queue_time.mean, a.queue_time.maximum) == (3.0, 4.0)
    assert (a.resident_seconds, a.page_seconds) == (2 + 5, 4 * 7)
    assert (b.requests, b.loads, b.evictions, b.resident_seconds, b.page_seconds) == (0, 0, 1, 2.0, 4.0)
    assert (lost.requests, lost.completed, lost.queue_time.mean, lost.resident_seconds) == (1, 0, 9.0, 0)
    assert (by_name[None].requests, by_name[None].loads) == (1, 0)


def test_resident_seconds_agree_with_a_count_per_second(rng) -> None:
    stays = []
    for name in "xyz":
        edges = rng.choice(1000, 10, replace=False)
        edges.sort()
        stays += [PoolStay(name, name, 3, float(a), float(b)) for a, b in edges.reshape(-1, 2)]
    by_name = adapter_metrics([], stays, start=200.0, end=800.0)
    for name in "xyz":
        mine = [(s.loaded, s.evicted) for s in stays if s.adapter == name]
        moments = sum(any(a <= t < b for a, b in mine) for t in range(200, 800))
        assert by_name[name].resident_seconds == moments
        assert by_name[name].loads == sum(200 <= a <= 800 for a, _ in mine)


def sample(time, free, kv, in_use, idle):
    """Half of the KV pages belong to the prefix cache; a fifth of these are idle."""
    pages = PoolPages(free, kv // 2, kv // 2 - kv // 10, kv // 10, in_use, idle)
    return PoolSample(time, pages, running=0, waiting=0)


def test_pool_use_weights_samples_by_duration() -> None:
    use = pool_use([sample(0, 20, 0, 0, 0), sample(1, 0, 10, 6, 4), sample(4, 0, 20, 0, 0)])
    mean = {"free": 0.25, "kv": 0.1875, "prefix_in_use": 0.15, "prefix_idle": 0.0375}
    assert use.mean == pytest.approx(mean | {"adapter_in_use": 0.225, "adapter_idle": 0.15, "adapter_arriving": 0})
    peak = {"free": 1.0, "kv": 0.5, "prefix_in_use": 0.4, "prefix_idle": 0.1}
    assert use.peak == pytest.approx(peak | {"adapter_in_use": 0.3, "adapter_idle": 0.2, "adapter_arriving": 0})
    assert sum(use.mean.values()) == pytest.approx(1)


def test_pool_use_over_no_time_is_refused() -> None:
    with pytest.raises(MetricsError, match="1 samples cover no time"):
        pool_use([sample(0, 10, 0, 0, 0)])
