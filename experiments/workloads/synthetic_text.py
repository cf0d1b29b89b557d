"""The paper's synthetic workload, as its text has it (section 7.1; its code differs, see `synthetic`).

Every adapter has an arrival process of its own: times between its requests are Gamma distributed with a coefficient of
variation cv, and its rate is its share of the total by a power law with exponent alpha. So alpha = 0 spreads requests
evenly and larger values prefer low adapter numbers, while in the code alpha = 1 is even and smaller values are not:
with n adapters, the code's alpha gives the first one the share n^-alpha, the text's 1 / (1 + 2^-alpha + ... +
n^-alpha). And cv is of each adapter's arrivals here; the times between any two requests vary less, the more adapters
there are (at cv = 4: 2.3 with 100 of them).

The text does not say how a process begins. Here each is stationary: it has been running since long before 0. (Had each
adapter a request at 0 before, then with cv > 1, and rates of a few requests a run, all adapters would burst at once
at the start, and the total rate be far above the one asked for.)
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from experiments.workloads.arguments import check_arguments, ranks_in_turn
from experiments.workloads.popularity import zipf_shares
from experiments.workloads.workload import BASE, Workload
from slora_jax import ConfigError


def synthetic_text(
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
    """The requests that arrive in [0, duration); their number is random, with the mean `rate * duration`.

    num_adapters: 0 sends all to the base model, as one process. ranks: the setting's, which the adapters take in turn.
    alpha: adapter i has the rate `rate` (i + 1)^-alpha / sum_j (j + 1)^-alpha. cv: of the times between the requests of
    one adapter. Lengths in tokens are uniform in [low, high], both included.

    Raises:
      ConfigError: a field is out of range.
    """
    check_arguments("synthetic_text", num_adapters=num_adapters, ranks=ranks, rate=rate, duration=duration, cv=cv)
    if not 0 <= alpha < math.inf:
        raise ConfigError(f"synthetic_text: alpha={alpha}: must be at least 0")
    for name, (low, high) in {"input_range": input_range, "output_range": output_range}.items():
        if not 1 <= low <= high:
            raise ConfigError(f"synthetic_text: {name}={[low, high]}: must be [low, high] with 1 <= low <= high")
    random = np.random.default_rng(seed)
    rates = rate * zipf_shares(max(num_adapters, 1), alpha)
    times = [_process(random, own, cv, duration) for own in rates.tolist()]
    arrival = np.concatenate(times)
    order = np.argsort(arrival, kind="stable")
    adapter = np.repeat(np.arange(len(times)), [len(own) for own in times])[order]
    return Workload(
        arrival=arrival[order],
        adapter=adapter if num_adapters else np.full(len(order), BASE),
        prompt_tokens=random.integers(*input_range, len(order), endpoint=True),
        output_tokens=random.integers(*output_range, len(order), endpoint=True),
        ranks=ranks_in_turn(num_adapters, ranks),
    )


def _process(random: np.random.Generator, rate: float, cv: float, duration: float) -> np.ndarray:
    """Times in [0, duration) of a stationary renewal process with Gamma intervals.

    The interval that covers 0 is drawn with a probability proportional to its length, which for a Gamma interval of
    shape k is one of shape k + 1, and 0 falls anywhere in it.
    """
    shape, scale = 1 / (cv * cv), cv * cv / rate
    times = [random.random(1) * random.gamma(shape + 1, scale)]
    while times[-1][-1] < duration:
        more = math.ceil(1.2 * rate * (duration - times[-1][-1])) + 10
        times.append(times[-1][-1] + np.cumsum(random.gamma(shape, scale, more)))
    arrival = np.concatenate(times)
    return arrival[arrival < duration]
