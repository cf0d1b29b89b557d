"""Requests that are all present at the start: what throughput comparisons use."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import numpy as np

from experiments.workloads.arguments import check_arguments, check_range, ranks_in_turn
from experiments.workloads.popularity import hot_shares, zipf_shares
from experiments.workloads.workload import BASE, Workload
from slora_jax import ConfigError


def batch(
    *,
    num_adapters: int,
    ranks: Sequence[int],
    rate: float,
    duration: float,
    seed: int = 42,
    requests: int = 64,
    used: int | None = None,
    spread: Literal["even", "zipf", "hot"] = "even",
    exponent: float = 1.0,
    hot_share: float = 0.9,
    input_range: tuple[int, int] = (16, 129),
    output_range: tuple[int, int] = (32, 33),
) -> Workload:
    """`requests` requests that arrive at 0, in random order of their adapters.

    Args:
      num_adapters: registered; 0 sends all requests to the base model.
      ranks: which the adapters take in turn.
      rate, duration: not used.
      used: adapters that requests ask for, the first of those registered; None: all.
      spread: "even": every adapter gets as many requests as any other, or one more. "zipf": by Zipf's law with
        `exponent`. "hot": adapter 0 gets `hot_share` of the requests, the others share the rest.
      input_range, output_range: tokens, uniform in [low, high).

    Raises:
      ConfigError: a field is out of range.
    """
    check_arguments("batch", num_adapters=num_adapters, ranks=ranks, rate=rate, duration=duration, requests=requests)
    check_range("batch", input_range=input_range, output_range=output_range)
    used = num_adapters if used is None else used
    if not 0 <= used <= num_adapters or not 0 < hot_share <= 1:
        raise ConfigError(
            f"batch: used={used}, hot_share={hot_share}: used must be 0 to num_adapters={num_adapters}, hot_share in "
            "(0, 1]"
        )
    random = np.random.default_rng(seed)
    prompts = random.integers(*input_range, requests)  # first, so that they do not depend on the adapters
    outputs = random.integers(*output_range, requests)
    if not used:
        adapter = np.full(requests, BASE)
    elif spread == "even":
        adapter = random.permutation(np.arange(requests) % used)
    else:
        shares = zipf_shares(used, exponent) if spread == "zipf" else hot_shares(used, hot_share)
        adapter = random.choice(used, requests, p=shares)
    return Workload(
        arrival=np.zeros(requests),
        adapter=adapter,
        prompt_tokens=prompts,
        output_tokens=outputs,
        ranks=ranks_in_turn(num_adapters, ranks),
    )
