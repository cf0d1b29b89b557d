"""The adapters of requests, by popularity."""

from __future__ import annotations

from typing import Literal, get_args

import numpy as np

from experiments.workloads.workload import BASE
from slora_jax import ConfigError

Popularity = Literal["zipf", "power"]


def zipf_shares(count: int, exponent: float) -> np.ndarray:
    """Returns shares of the requests, `[count]`, proportional to (i + 1)^-exponent."""
    weights = 1 / np.arange(1, count + 1) ** exponent
    return weights / weights.sum()


def hot_shares(count: int, hot_share: float) -> np.ndarray:
    """Returns shares of the requests, `[count]`: `hot_share` for adapter 0, and the rest evenly for the others."""
    return np.r_[hot_share, np.full(count - 1, (1 - hot_share) / max(count - 1, 1))] if count > 1 else np.ones(1)


def draw_adapters(
    random: np.random.RandomState,
    num_adapters: int,
    requests: int,
    popularity: Popularity,
    exponent: float,
    alpha: float,
) -> np.ndarray:
    """Draws an adapter for each request, `[requests]`; with 0 adapters, the base model.

    Args:
      popularity: "zipf": by `zipf_shares`. "power": as the paper's code, floor(n u^(1/alpha)) of a uniform u, so that
        alpha = 1 is even and smaller values prefer low numbers.

    Raises:
      ConfigError: an argument is out of range.
    """
    if popularity not in get_args(Popularity):
        raise ConfigError(f"popularity={popularity!r}: must be one of {get_args(Popularity)}")
    if not 0 <= exponent < np.inf or not 0 < alpha < np.inf:
        raise ConfigError(f"exponent={exponent}, alpha={alpha}: exponent must be at least 0, and alpha positive")
    if not num_adapters:
        return np.full(requests, BASE)
    if popularity == "power":
        return (random.power(alpha, requests) * num_adapters).astype(int)
    return random.choice(num_adapters, requests, p=zipf_shares(num_adapters, exponent))
