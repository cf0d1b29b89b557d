"""Serving metrics of one run, as S-LoRA's code computes them (`get_res_stats` in benchmarks/run_exp.py, and
slora/utils/metric.py): the paper's text names them, the code says what they are."""

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
"""The paper's objective for the first token's latency."""

WARMUP_SECONDS = 10.0
"""What the paper strips from each end of a run."""


@dataclass(frozen=True)
class ServingMetrics:
    """One run. Seconds, and requests or tokens per second.

    Latencies are over completed requests only; attainment and satisfaction are over all, an aborted one counting 0.

    wall_seconds: from the start to the last end, so drain is included. throughput: completed per wall second.
    stripped_throughput: None unless the request rate was given. token_throughput: output tokens of completed requests
    per wall second. latency_per_token: mean of latency / (prompt + output tokens); latency_per_output_token: mean of
    latency / output tokens. inter_token_latency: over all gaps of all completed requests. queue_time: over all
    requests. satisfaction_p50, satisfaction_p10: what half and nine tenths of the requests reach.
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
    """Measures a run by its requests, every one of which has ended.

    start, end: seconds on the records' clock; None: the first arrival and the last end. (The paper starts its clock
    with the generator of requests, an inter-arrival time before the first.) request_rate: requests per second of the
    workload, for the stripped throughput.

    Raises:
      MetricsError: no requests; an empty window, or one too short to strip.
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
    """Completed requests (or tokens) per second of wall time, drain included.

    Raises:
      MetricsError: no time passed.
    """
    if wall_seconds <= 0:
        raise MetricsError(f"wall_seconds={wall_seconds:g}: must be positive")
    return completed / wall_seconds


def stripped_throughput(
    completed: int, wall_seconds: float, request_rate: float, warmup_seconds: float = WARMUP_SECONDS
) -> float:
    """Throughput without the warm-up and as long a time at the end: `(N - 2 int(w R)) / (T - 2 w)`.

    It presumes that `int(w R)` requests complete in each of the stripped `w = warmup_seconds`, whatever did.

    Raises:
      MetricsError: the run is no longer than what is stripped, or fewer requests completed than are stripped. (The
        paper's code reports a negative throughput then, as in six runs of 15 s among its raw results.)
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
    """1 if the first token came in less than `slo_seconds`, else 0."""
    return float(first_token_latency < slo_seconds)


def satisfaction(first_token_latency: float, slo_seconds: float = SLO_SECONDS) -> float:
    """A user's reward for a first token after `t` seconds: `1 - (t / slo_seconds)^2`, 0 from `slo_seconds` on."""
    return max(0.0, 1 - (first_token_latency / slo_seconds) ** 2)


def _first_token_latency(record: RequestRecord) -> float:
    latency = record.first_token_latency
    assert latency is not None  # a completed request has one
    return latency
