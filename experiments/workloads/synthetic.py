"""The paper's synthetic workload, as its code makes it (S-LoRA benchmarks/trace.py; the text differs, see
`synthetic_text`).

The text has an arrival process for every adapter, with rates by a power law. The code draws one Gamma process for all
of them, and an adapter for every request. Its legacy NumPy generator is fixed for all versions, so the same seed gives
the very requests that the paper's systems served: adapters first, then prompt lengths, output lengths, intervals.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from experiments.workloads.arguments import check_arguments, check_range, ranks_in_turn
from experiments.workloads.workload import BASE, Workload


def synthetic(
    *,
    num_adapters: int,
    ranks: Sequence[int],
    rate: float,
    duration: float,
    seed: int = 42,
    alpha: float = 1.0,
    cv: float = 1.0,
    input_range: tuple[int, int] = (8, 512),
    output_range: tuple[int, int] = (8, 512),
) -> Workload:
    """`int(rate * duration)` requests, of which the last may arrive before or after `duration` seconds.

    num_adapters: 0 sends all to the base model. ranks: the setting's, which the adapters take in turn. alpha: 1 spreads
    requests evenly, smaller values prefer low adapter numbers. cv: coefficient of variation of the time between
    requests, Gamma distributed with shape 1/cv^2 and scale cv^2/rate. Lengths in tokens are uniform in [low, high).

    Raises:
      ConfigError: a field is out of range.
    """
    check_arguments(
        "synthetic", num_adapters=num_adapters, ranks=ranks, rate=rate, duration=duration, alpha=alpha, cv=cv
    )
    check_range("synthetic", input_range=input_range, output_range=output_range)
    random = np.random.RandomState(seed)
    requests = int(rate * duration)
    adapter = (random.power(alpha, requests) * max(num_adapters, 1)).astype(int)
    prompt_tokens = random.randint(*input_range, requests)
    output_tokens = random.randint(*output_range, requests)
    intervals = random.gamma(1 / (cv * cv), cv * cv / rate, requests)
    return Workload(
        arrival=np.cumsum(intervals),
        adapter=adapter if num_adapters else np.full(requests, BASE),
        prompt_tokens=prompt_tokens,
        output_tokens=output_tokens,
        ranks=ranks_in_turn(num_adapters, ranks),
    )
