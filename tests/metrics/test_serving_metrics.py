"""Serving metrics: by hand, against a literal transcription of the paper's formulas, and against its raw results."""

import csv
import math
from dataclasses import astuple
from pathlib import Path

import numpy as np
import pytest

from slora_jax.errors import MetricsError
from slora_jax.metrics import (
    Distribution,
    RequestRecord,
    attainment,
    satisfaction,
    serving_metrics,
    stripped_throughput,
    throughput,
)
from slora_jax.scheduling import FinishReason

RESULTS_FILE = Path(__file__).parents[2] / "experiments" / "paper" / "results.csv"
EXTRAPOLATED = "synthetic/bmm/synthetic_req_rate_a100-80_S4_bmm.jsonl"
"""Five rows whose latency, satisfaction and attainment were put in by hand (reference, Fig 6)."""


def record(arrival, first, finished, *, reason=FinishReason.LENGTH, tokens=(), admitted=None, adapter=None, prompt=10):
    return RequestRecord(
        request_id="r",
        adapter=adapter,
        prompt_tokens=prompt,
        output_tokens=len(tokens) or 5,
        finish_reason=reason,
        arrival=arrival,
        finished=finished,
        admitted=admitted,
        first_token=first,
        token_times=tuple(tokens),
    )


RUN = [
    record(100.0, 103.0, 105.0, tokens=(103.0, 103.5, 105.0), admitted=102.0, prompt=2),  # satisfaction 3/4
    record(101.0, 107.0, 109.0, tokens=(107.0, 109.0), admitted=106.0, prompt=2),  # 6 s: no longer in time
    record(102.0, None, 110.0, reason=FinishReason.CANCELLED),  # never admitted: it queued for 8 s
    record(104.0, 104.0, 108.0, tokens=(104.0, 105.0, 106.0, 108.0), admitted=104.0, prompt=4),  # 1
]


def test_a_run_of_four_requests_by_hand() -> None:
    metrics = serving_metrics(RUN)
    assert (metrics.requests, metrics.completed, metrics.aborted) == (4, 3, 1)
    assert metrics.finish_reasons == {"length": 3, "cancelled": 1}
    assert metrics.wall_seconds == 10  # to the end of the drain
    assert metrics.throughput == pytest.approx(0.3)
    assert metrics.token_throughput == pytest.approx(0.9)
    assert metrics.stripped_throughput is None
    assert astuple(metrics.latency) == pytest.approx(astuple(Distribution(3, 17 / 3, 5.0, 7.4, 7.94, 8.0)))
    assert astuple(metrics.first_token_latency) == pytest.approx(astuple(Distribution(3, 3.0, 3.0, 5.4, 5.94, 6.0)))
    assert metrics.latency_per_token == pytest.approx((5 / 5 + 8 / 4 + 4 / 8) / 3)
    assert metrics.latency_per_output_token == pytest.approx((5 / 3 + 8 / 2 + 4 / 4) / 3)
    assert astuple(metrics.inter_token_latency) == pytest.approx(astuple(Distribution.of([0.5, 1.5, 2, 1, 1, 2])))
    assert astuple(metrics.queue_time) == pytest.approx(astuple(Distribution.of([2, 5, 8, 0])))
    assert metrics.attainment == pytest.approx(2 / 4)
    assert metrics.satisfaction == pytest.approx((0.75 + 0 + 0 + 1) / 4)
    assert (metrics.satisfaction_p50, metrics.satisfaction_p10) == pytest.approx((0.375, 0.0))


def test_the_window_may_begin_before_the_first_arrival() -> None:
    metrics = serving_metrics(RUN, start=90.0, end=114.0, request_rate=0.2, warmup_seconds=7.0)
    assert metrics.throughput == 3 / 24
    assert metrics.stripped_throughput == (3 - 2) / (24 - 14)  # int(7 s * 0.2 / s) = 1 at each end


@pytest.mark.parametrize(("seconds", "reward"), [(0, 1), (3, 0.75), (5.999, 1 - (5.999 / 6) ** 2), (6, 0), (60, 0)])
def test_satisfaction_and_attainment_end_at_the_objective(seconds, reward) -> None:
    assert satisfaction(seconds) == pytest.approx(reward)
    assert attainment(seconds) == (seconds < 6)


def test_aborted_request_earns_nothing_despite_an_early_first_token() -> None:
    metrics = serving_metrics([record(0.0, 1.0, 2.0, reason=FinishReason.ERROR), record(0.0, 1.0, 4.0)])
    assert (metrics.attainment, metrics.aborted, metrics.latency.count) == (0.5, 1, 1)
    assert metrics.satisfaction == pytest.approx((1 - 1 / 36) / 2)


def test_all_aborted_leaves_latencies_undefined_and_shares_zero() -> None:
    metrics = serving_metrics([record(0.0, None, 1.0, reason=FinishReason.CANCELLED)] * 3)
    assert (metrics.throughput, metrics.attainment, metrics.satisfaction, metrics.aborted) == (0, 0, 0, 3)
    assert metrics.latency.count == 0
    assert math.isnan(metrics.latency.mean)


def test_random_runs_agree_with_the_papers_formulas(rng) -> None:
    for _ in range(6):
        arrivals = rng.uniform(0, 60, 200)
        first = arrivals + rng.exponential(4, 200)
        finished = first + rng.exponential(10, 200)
        aborted = rng.random(200) < 0.2
        records = [
            record(a, None if x else f, e, reason=FinishReason.CANCELLED if x else FinishReason.STOP)
            for a, f, e, x in zip(arrivals, first, finished, aborted, strict=True)
        ]
        metrics = serving_metrics(records, start=0.0, request_rate=3.0)

        total_time = max(finished)
        latency = [(e - a, f - a) for a, f, e, x in zip(arrivals, first, finished, aborted, strict=True) if not x]
        abort_satisfaction = [0] * int(sum(aborted))
        rewards = [1 - t * t / 36 if t < 6 else 0 for _, t in latency] + abort_satisfaction
        attained = [1 if t < 6 else 0 for _, t in latency] + abort_satisfaction
        assert metrics.throughput == pytest.approx(len(latency) / total_time)
        assert metrics.stripped_throughput == pytest.approx((len(latency) - 2 * 30) / (total_time - 20))
        assert metrics.latency.mean == pytest.approx(np.mean([t for t, _ in latency]))
        assert metrics.first_token_latency.p90 == pytest.approx(np.percentile([t for _, t in latency], 90))
        assert metrics.satisfaction == pytest.approx(np.mean(rewards))
        assert metrics.satisfaction_p10 == pytest.approx(np.percentile(rewards, 10))
        assert metrics.attainment == pytest.approx(np.mean(attained))
        assert metrics.aborted == sum(aborted)


@pytest.mark.parametrize(
    ("completed", "wall", "rate", "warmup", "message"),
    [
        (100, 20.0, 2.0, 10.0, "of 20 s and 100 completed requests, 2 x 10 s and 40 requests are stripped"),
        (100, 7.5, 2.0, 10.0, "run longer, or lower warmup_seconds"),
        (39, 60.0, 2.0, 10.0, "39 completed requests, 2 x 10 s and 40 requests"),
        (100, 60.0, 2.0, -1.0, "warmup_seconds=-1: must be at least 0"),
    ],
)
def test_a_window_too_short_to_strip_is_refused(completed, wall, rate, warmup, message) -> None:
    with pytest.raises(MetricsError, match=message):
        stripped_throughput(completed, wall, rate, warmup)


def test_invalid_runs_and_records_are_refused() -> None:
    with pytest.raises(MetricsError, match="no requests"):
        serving_metrics([])
    with pytest.raises(MetricsError, match="wall_seconds=0: must be positive"):
        serving_metrics([record(1.0, 1.0, 1.0)])
    with pytest.raises(MetricsError, match="'r' ended with stop, but has no first token"):
        record(0.0, None, 1.0, reason=FinishReason.STOP)


@pytest.fixture(scope="module")
def paper_rows() -> list[dict[str, str]]:
    with RESULTS_FILE.open() as file:
        return list(csv.DictReader(file))


def test_the_papers_raw_throughputs_follow_from_its_counts_and_times(paper_rows) -> None:
    refused = []
    for row in paper_rows:
        rate, total = float(row["R"]), float(row["total_time"])
        completed = int(rate * float(row["D"])) - int(row["aborts"] or 0)  # all requests are sent; none fails
        assert throughput(completed, total) == pytest.approx(float(row["throughput"])), row["file"]
        try:
            stripped = stripped_throughput(completed, total, rate)
        except MetricsError:
            refused.append(row)
            continue
        assert stripped == pytest.approx(float(row["strip_throughput"])), row["file"]
    assert len(paper_rows) == 1215
    assert [float(row["D"]) for row in refused] == [15] * 6  # arrivals of 15 s, stripped by 20
    assert all(float(row["strip_throughput"]) < 0 for row in refused)


def test_papers_attainments_are_shares_of_its_requests_except_manual_rows(paper_rows) -> None:
    odd = []
    for row in paper_rows:
        requests = int(float(row["R"]) * float(row["D"]))
        attained, reward = float(row["attainment"]), float(row["satisfaction"])
        whole = abs(requests * attained - round(requests * attained)) < 1e-6
        if not whole or reward > attained + 1e-9:  # a reward is at most 1, and only for those in time
            odd.append(row["file"])
    assert odd == [EXTRAPOLATED] * 5
