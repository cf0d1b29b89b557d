"""A stand-in for the paper's real workload, whose log was not released.

The paper samples single-turn conversations of August 2023 from LMSYS Chatbot Arena, drops those with a prompt or an
answer of 512 tokens and more, gives each of about 26 models one adapter, and rescales the timestamps linearly to the
run's duration. What is published of it: the number of models, mean lengths of 85 and 165 tokens, and the span of days.
Lengths here are lognormal with these means, cut at 512; a few models take most requests (Zipf); arrivals follow a day's
rhythm, as many days as the log has in one run. Results on it are an imitation, not a reproduction.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from experiments.workloads.arguments import check_arguments, ranks_in_turn
from experiments.workloads.popularity import zipf_shares
from experiments.workloads.workload import BASE, Workload
from slora_jax import ConfigError

MODELS = 26
MEAN_PROMPT, MEAN_OUTPUT, CUT = 85, 165, 512
SIGMA_PROMPT, SIGMA_OUTPUT = 1.2, 0.9
"""Spread of the logarithm of the lengths. Not published: a guess from chat logs."""
ZIPF = 0.6
DAYS = 30
RHYTHM = 0.5
"""How far the rate swings about its mean within a day, of that mean."""


def arena_like(
    *, num_adapters: int = MODELS, ranks: Sequence[int], rate: float, duration: float, seed: int = 42
) -> Workload:
    """`int(rate * duration)` requests, the first at 0 and the last at `duration` seconds; each model has an adapter,
    which take `ranks` in turn. num_adapters: 0 sends all to the base model.

    Raises:
      ConfigError: a field is out of range.
    """
    check_arguments("arena_like", num_adapters=num_adapters, ranks=ranks, rate=rate, duration=duration)
    random = np.random.default_rng(seed)
    requests = int(rate * duration)
    if requests < 2:
        raise ConfigError(f"arena_like: rate={rate}, duration={duration}: {requests} requests span no time")
    return Workload(
        arrival=_arrivals(random, requests, duration),
        adapter=random.choice(num_adapters, requests, p=zipf_shares(num_adapters, ZIPF))
        if num_adapters
        else np.full(requests, BASE),
        prompt_tokens=_lengths(random, requests, MEAN_PROMPT, SIGMA_PROMPT),
        output_tokens=_lengths(random, requests, MEAN_OUTPUT, SIGMA_OUTPUT),
        ranks=ranks_in_turn(num_adapters, ranks),
    )


def _arrivals(random: np.random.Generator, requests: int, duration: float) -> np.ndarray:
    """Independent times with density 1 + RHYTHM sin(2 pi DAYS t), sorted and rescaled to [0, duration]."""
    grid = np.linspace(0, 1, 100 * DAYS)
    cumulative = grid + RHYTHM * (1 - np.cos(2 * np.pi * DAYS * grid)) / (2 * np.pi * DAYS)
    times = np.sort(np.interp(random.uniform(0, cumulative[-1], requests), cumulative, grid))
    return (times - times[0]) / (times[-1] - times[0]) * duration


def _lengths(random: np.random.Generator, requests: int, mean: float, sigma: float) -> np.ndarray:
    """Lognormal lengths in [1, CUT) whose mean, after the cut, is `mean`: the median is found by bisection."""
    normal = random.standard_normal(4 * requests)
    low, high = 1.0, float(mean)
    for _ in range(40):
        median = (low + high) / 2
        drawn = np.maximum(median * np.exp(sigma * normal), 1)
        low, high = (median, high) if drawn[drawn < CUT].mean() < mean else (low, median)
    return drawn[drawn < CUT][:requests].astype(int)
