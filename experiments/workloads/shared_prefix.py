"""Requests that begin with their adapter's instructions, for prefix caches."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from experiments.workloads.arguments import check_arguments, check_range, ranks_in_turn
from experiments.workloads.popularity import draw_adapters
from experiments.workloads.workload import Workload


def shared_prefix(
    *,
    num_adapters: int,
    ranks: Sequence[int],
    rate: float,
    duration: float,
    seed: int = 42,
    prefix_tokens: int = 512,
    texts: int = 1,
    exponent: float = 1.0,
    cv: float = 1.0,
    input_range: tuple[int, int] = (8, 128),
    output_range: tuple[int, int] = (8, 256),
) -> Workload:
    """`int(rate * duration)` requests, of which the last may arrive before or after `duration` seconds.

    Each prompt is one of its adapter's `texts` instructions of `prefix_tokens` tokens, drawn uniformly, and then a
    question. exponent: of the adapters' Zipf shares. cv: of the times between requests, Gamma distributed.
    input_range: tokens of the question; these and the output's are uniform in [low, high). num_adapters: 0 sends all to
    the base model.

    Raises:
      ConfigError: a field is out of range.
    """
    positive = {"prefix_tokens": prefix_tokens, "texts": texts, "cv": cv}
    check_arguments("shared_prefix", num_adapters=num_adapters, ranks=ranks, rate=rate, duration=duration, **positive)
    check_range("shared_prefix", input_range=input_range, output_range=output_range)
    random = np.random.RandomState(seed)
    requests = int(rate * duration)
    adapter = draw_adapters(random, num_adapters, requests, "zipf", exponent, alpha=1.0)
    return Workload(
        arrival=np.cumsum(random.gamma(1 / (cv * cv), cv * cv / rate, requests)),
        adapter=adapter,
        prompt_tokens=prefix_tokens + random.randint(*input_range, requests),
        output_tokens=random.randint(*output_range, requests),
        ranks=ranks_in_turn(num_adapters, ranks),
        prefix_text=np.maximum(adapter, 0) * texts + random.randint(0, texts, requests),
        prefix_tokens=np.full(requests, prefix_tokens),
    )
