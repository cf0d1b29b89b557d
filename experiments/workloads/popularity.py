"""Which adapters requests are for."""

from __future__ import annotations

from typing import Literal, get_args

import numpy as np

from experiments.workloads.workload import BASE
from slora_jax import ConfigError

Popularity = Literal["zipf", "power"]


def zipf_shares(count: int, exponent: float) -> np.ndarray:
    """Shares of the requests, `[count]`: proportional to (i + 1)^-exponent. 0: all the same."""
    weights = 1 / np.arange(1, count + 1) ** exponent
    return weights / weights.sum()


def draw_adapters(
    random: np.random.RandomState,
    num_adapters: int,
    requests: int,
    popularity: Popularity,
    exponent: float,
    alpha: float,
) -> np.ndarray:
    """An adapter for each request, `[requests]`; the base model for all, of 0 adapters.

    popularity: "zipf", by `zipf_shares`; "power", as the paper's code: floor(n u^(1/alpha)) of a uniform u, so that
    alpha = 1 is even and smaller values prefer low numbers.

    Raises:
      ConfigError: another popularity, an exponent below 0, an alpha that is not positive.
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
