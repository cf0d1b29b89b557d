"""The live page's state: history, rates, percentiles."""

import itertools
import json

import numpy as np
import pytest
from observed_engine import finished_request, recording
from page_server import played

from slora_jax.serving.observability.histogram import FINE_SECONDS, Histogram
from slora_jax.serving.observability.live_state import SAMPLES, WINDOW, LiveState
from slora_jax.serving.observability.prometheus import ServerMetrics

SHARES = (0.01, 0.5, 0.95, 1.0)


def test_percentiles_equal_numpys_within_three_percent(rng) -> None:
    values = np.exp(rng.normal(-4, 2, 5000))
    histogram = Histogram(FINE_SECONDS)
    for some in np.array_split(values, 7):
        histogram.add(some)
    expected = np.quantile(values, SHARES, method="inverted_cdf").tolist()
    assert histogram.percentiles(histogram.counts, SHARES) == pytest.approx(expected, rel=0.03)
    assert histogram.total == pytest.approx(values.sum())
    assert histogram.percentiles(np.zeros_like(histogram.counts)) == [None, None]


def test_values_beyond_all_bounds_are_counted() -> None:
    histogram = Histogram(FINE_SECONDS)
    histogram.add([0.0, 1e9])
    assert histogram.percentiles(histogram.counts, (0.5, 1.0)) == pytest.approx([1e-5, 1e4])


def test_history_equals_the_recorded_run() -> None:
    moments = recording().moments
    state = json.loads(json.dumps(played(recording(), len(moments) - 1, every=3).to_json("ready")))
    history, last = state["history"], moments[-1].snapshot
    assert {len(values) for values in history.values()} == {SAMPLES}
    assert history["age_seconds"] == sorted(history["age_seconds"], reverse=True)
    shown = [m for n, m in enumerate(moments) if n % 3 == 0 or n == len(moments) - 1][-SAMPLES:]
    assert history["running"] == [m.snapshot.stats.running for m in shown]
    assert history["waiting"] == [m.snapshot.stats.waiting for m in shown]
    seconds = [b.snapshot.time - a.snapshot.time for a, b in itertools.pairwise(shown)]
    tokens = sum(rate * s for rate, s in zip(history["tokens_per_second"][1:], seconds, strict=True))
    generated = shown[-1].snapshot.stats.tokens_generated - shown[0].snapshot.stats.tokens_generated
    assert tokens == pytest.approx(generated, rel=0.01)
    assert state["pool"] == {"pages": 300, "kinds": dict(last.pages)}
    assert state["totals"]["finished"] == 160 and state["totals"]["upload_bytes"] == last.stats.upload_bytes
    assert state["adapters"]["registered"] == sum(state["adapters"]["states"].values()) == 60


def test_percentiles_are_of_the_last_minute_only() -> None:
    moment = recording().moments[30]
    metrics = ServerMetrics(lambda: moment.snapshot)
    live = LiveState("m", metrics)
    metrics.finished(finished_request(first_token=2.0))
    for _ in range(WINDOW):
        live.sample(moment.snapshot, moment.tiers)
    assert live.to_json("ready")["latency"]["first_token_p50"] == pytest.approx(2.0, rel=0.03)
    assert live.to_json("ready")["latency"]["inter_token_p95"] == pytest.approx(0.5, rel=0.03)
    live.sample(moment.snapshot, moment.tiers)
    assert live.to_json("ready")["latency"]["first_token_p50"] is None
    assert live.to_json("ready")["history"]["tokens_per_second"][-1] == 0  # the engine is stuck: no newer snapshot
    metrics.close()


def test_state_exists_before_the_engine() -> None:
    metrics = ServerMetrics(lambda: None)
    live = LiveState("m", metrics)
    live.sample(None, {})
    state = live.to_json("starting", "compiling")
    assert state["pool"] is state["queue"] is state["adapters"] is state["totals"] is None
    assert state["history"]["running"] == [] and (state["status"], state["detail"]) == ("starting", "compiling")
    metrics.close()
