"""Conversations: each prompt is the one before and a new message, sent some time after the answer."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from experiments.workloads.arguments import check_arguments, check_range, ranks_in_turn
from experiments.workloads.popularity import draw_adapters
from experiments.workloads.workload import INDEPENDENT, Workload
from slora_jax import ConfigError


def conversations(
    *,
    num_adapters: int,
    ranks: Sequence[int],
    rate: float,
    duration: float,
    seed: int = 42,
    turns: int = 6,
    think_seconds: float = 10.0,
    exponent: float = 1.0,
    cv: float = 1.0,
    input_range: tuple[int, int] = (8, 128),
    output_range: tuple[int, int] = (8, 256),
) -> Workload:
    """`int(rate * duration / turns)` conversations of `turns` requests each, one after the other in the workload. They
    begin at times of their own, on average over `duration` seconds; a later turn follows `think_seconds` after the
    answer to the one before (`Workload.after`).

    A turn's prompt is that of the turn before, and a message. Answers are no part of it, so that the requests are the
    same whoever answers. exponent: of the adapters' Zipf shares, of which each conversation has one. cv: of the times
    between beginnings, Gamma distributed. input_range: tokens of a message; these and the output's are uniform in
    [low, high). num_adapters: 0 sends all to the base model.

    Raises:
      ConfigError: a field is out of range.
    """
    check_arguments(
        "conversations", num_adapters=num_adapters, ranks=ranks, rate=rate, duration=duration, turns=turns, cv=cv
    )
    check_range("conversations", input_range=input_range, output_range=output_range)
    if not 0 <= think_seconds < np.inf:
        raise ConfigError(f"conversations: think_seconds={think_seconds}: must be at least 0")
    random = np.random.RandomState(seed)
    count = int(rate * duration / turns)
    adapter = draw_adapters(random, num_adapters, count, "zipf", exponent, alpha=1.0)
    arrival = np.full((count, turns), float(think_seconds))
    arrival[:, 0] = np.cumsum(random.gamma(1 / (cv * cv), cv * cv * turns / rate, count))
    after = np.arange(-1, count * turns - 1).reshape(count, turns)
    after[:, 0] = INDEPENDENT
    prompts = np.cumsum(random.randint(*input_range, (count, turns)), axis=1).ravel()
    return Workload(
        arrival=arrival.ravel(),
        adapter=np.repeat(adapter, turns),
        prompt_tokens=prompts,
        output_tokens=random.randint(*output_range, count * turns),
        ranks=ranks_in_turn(num_adapters, ranks),
        prefix_text=np.repeat(np.arange(count), turns),
        prefix_tokens=prompts,
        after=after.ravel(),
    )
