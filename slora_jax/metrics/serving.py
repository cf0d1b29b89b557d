"""Serving metrics of one run. The paper does not define them; the definitions here are those of S-LoRA's code
(`get_res_stats` in benchmarks/run_exp.py, and slora/utils/metric.py)."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from slora_jax.errors import MetricsError
from slora_jax.metrics.distribution import Distribution
from slora_jax.metrics.record import FinishReason, RequestRecord

SLO_SECONDS = 6.0
"""The paper's objective for first-token latency."""

WARMUP_SECONDS = 10.0
"""Time that the paper strips from each end of a run."""


@dataclass(frozen=True)
class ServingMetrics:
    """Metrics of one run. Times are in seconds, throughputs in requests or tokens per second.

    Latencies cover completed requests only. Attainment and satisfaction cover all requests; aborted ones count as 0.

    Attributes:
      requests, completed, aborted: number of requests.
      finish_reasons: number of requests by reason.
      wall_seconds: time from the start to the last end, including drain.
      throughput: completed requests per wall second.
      stripped_throughput: see the function; None unless the request rate is given.
      token_throughput: output tokens of completed requests per wall second.
      latency_per_token: mean of latency / (prompt + output tokens).
      latency_per_output_token: mean of latency / output tokens.
      inter_token_latency: over all token gaps of completed requests.
      queue_time: over all requests.
      slo_seconds: objective for first-token latency.
      attainment: fraction of requests within the objective.
      satisfaction, satisfaction_p50, satisfaction_p10: mean, median and 10th percentile of the reward.
    """

    requests: int
    completed: int
    aborted: int
    finish_reasons: Mapping[FinishReason, int]
    wall_seconds: float
    throughput: float
    stripped_throughput: float | None
    token_throughput: float
    latency: Distribution
    first_token_latency: Distribution
    latency_per_token: float
    latency_per_output_token: float
    inter_token_latency: Distribution
    queue_time: Distribution
    slo_seconds: float
    attainment: float
    satisfaction: float
    satisfaction_p50: float
    satisfaction_p10: float


def serving_metrics(
    records: Sequence[RequestRecord],
    *,
    start: float | None = None,
    end: float | None = None,
    request_rate: float | None = None,
    warmup_seconds: float = WARMUP_SECONDS,
    slo_seconds: float = SLO_SECONDS,
) -> ServingMetrics:
    """Computes the metrics of a run.

    Args:
      records: all requests of the run.
      start, end: window, seconds on the records' clock; None is the first arrival and the last end. (The paper's clock
        starts with its request generator, one inter-arrival time before the first request.)
      request_rate: the workload's requests per second, for the stripped throughput.
      warmup_seconds: time stripped from each end.
      slo_seconds: objective for first-token latency.

    Raises:
      MetricsError: there are no requests, or the window is empty or too short to strip.
    """
    if not records:
        raise MetricsError("no requests: there is nothing to measure")
    start = min(r.arrival for r in records) if start is None else start
    end = max(r.finished for r in records) if end is None else end
    wall = end - start
    done = [r for r in records if r.completed]
    first = [_first_token_latency(r) for r in done]
    rewards = [satisfaction(t, slo_seconds) for t in first] + [0.0] * (len(records) - len(done))
    stripped = None
    if request_rate is not None:
        stripped = stripped_throughput(len(done), wall, request_rate, warmup_seconds)
    return ServingMetrics(
        requests=len(records),
        completed=len(done),
        aborted=len(records) - len(done),
        finish_reasons=dict(Counter(r.finish_reason for r in records)),
        wall_seconds=wall,
        throughput=throughput(len(done), wall),
        stripped_throughput=stripped,
        token_throughput=throughput(sum(r.output_tokens for r in done), wall),
        latency=Distribution.of(r.latency for r in done),
        first_token_latency=Distribution.of(first),
        latency_per_token=Distribution.of(r.latency / (r.prompt_tokens + r.output_tokens) for r in done).mean,
        latency_per_output_token=Distribution.of(r.latency / r.output_tokens for r in done).mean,
        inter_token_latency=Distribution.of(
            itertools.chain.from_iterable(r.inter_token_latencies.tolist() for r in done)
        ),
        queue_time=Distribution.of(r.queue_time for r in records),
        slo_seconds=slo_seconds,
        attainment=sum(attainment(t, slo_seconds) for t in first) / len(records),
        satisfaction=float(np.mean(rewards)),
        satisfaction_p50=float(np.percentile(rewards, 50)),
        satisfaction_p10=float(np.percentile(rewards, 10)),
    )


def throughput(completed: int, wall_seconds: float) -> float:
    """Completed requests (or tokens) per second of wall time, including drain. Raises MetricsError without any time."""
    if wall_seconds <= 0:
        raise MetricsError(f"wall_seconds={wall_seconds:g}: must be positive")
    return completed / wall_seconds


def stripped_throughput(
    completed: int, wall_seconds: float, request_rate: float, warmup_seconds: float = WARMUP_SECONDS
) -> float:
    """Throughput without `w` seconds at each end: `(N - 2 int(w R)) / (T - 2 w)`, in requests per second.

    It assumes that `int(w R)` requests complete in each stripped interval, as the paper's code does.

    Args:
      completed: N, completed requests.
      wall_seconds: T, duration of the run.
      request_rate: R, requests per second.
      warmup_seconds: w.

    Raises:
      MetricsError: the run is not longer than the stripped time, or fewer requests completed than are stripped. (The
        paper's code then reports a negative throughput, as for six runs of 15 s among its raw results.)
    """
    if warmup_seconds < 0:
        raise MetricsError(f"warmup_seconds={warmup_seconds:g}: must be at least 0")
    window, stripped = wall_seconds - 2 * warmup_seconds, 2 * int(request_rate * warmup_seconds)
    if window <= 0 or completed < stripped:
        raise MetricsError(
            f"stripped throughput: the run is too short: of {wall_seconds:g} s and {completed} completed requests, "
            f"2 x {warmup_seconds:g} s and {stripped} requests are stripped; run longer, or lower warmup_seconds"
        )
    return (completed - stripped) / window


def attainment(first_token_latency: float, slo_seconds: float = SLO_SECONDS) -> float:
    """Returns 1 if the first-token latency is below `slo_seconds`, else 0."""
    return float(first_token_latency < slo_seconds)


def satisfaction(first_token_latency: float, slo_seconds: float = SLO_SECONDS) -> float:
    """Returns the reward for a first-token latency of `t` seconds: `max(0, 1 - (t / slo_seconds)^2)`."""
    return max(0.0, 1 - (first_token_latency / slo_seconds) ** 2)


def _first_token_latency(record: RequestRecord) -> float:
    latency = record.first_token_latency
    assert latency is not None  # completed requests have one
    return latency
