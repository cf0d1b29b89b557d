"""Workloads that each need one mechanism of the engine.

Generators with the argument `round_number` continue from round to round of a measurement.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from experiments.workloads.arguments import check_arguments, check_range, ranks_in_turn
from experiments.workloads.batch import batch
from experiments.workloads.popularity import zipf_shares
from experiments.workloads.workload import BASE, Workload


def bursts(
    *,
    num_adapters: int,
    ranks: Sequence[int],
    rate: float,
    duration: float,
    seed: int = 42,
    round_number: int = 0,
    requests: int = 160,
    hot: int = 4,
    cold_share: float = 0.2,
    burst: int = 80,
    input_range: tuple[int, int] = (24, 49),
    output_range: tuple[int, int] = (64, 65),
) -> Workload:
    """`requests` requests in bursts at regular times: those of a burst that cannot run yet are what prefetch serves.

    Args:
      rate: requests per second. duration: not used.
      round_number: where the cycle through the cold adapters begins.
      hot: adapters of most requests, the first of those registered.
      cold_share: share of the requests that each ask for the next of the other adapters, in a cycle: an adapter has
        left the pool and a small host memory before it is asked for again.
      burst: requests that arrive together.

    Raises:
      ConfigError: a field is out of range.
    """
    check_arguments(
        "bursts", num_adapters=num_adapters, ranks=ranks, rate=rate, duration=duration, requests=requests, hot=hot,
        cold_adapters=num_adapters - hot, burst=burst,
    )  # fmt: skip
    check_range("bursts", input_range=input_range, output_range=output_range)
    random = np.random.default_rng((seed, round_number))
    count = round(cold_share * requests)
    cold = random.permutation(requests) < count
    turn = round_number * count + np.cumsum(cold)
    return Workload(
        arrival=np.arange(requests) // burst * burst / rate,
        adapter=np.where(cold, hot + turn % (num_adapters - hot), random.integers(0, hot, requests)),
        prompt_tokens=random.integers(*input_range, requests),
        output_tokens=random.integers(*output_range, requests),
        ranks=ranks_in_turn(num_adapters, ranks),
    )


def shifting(
    *,
    num_adapters: int,
    ranks: Sequence[int],
    rate: float,
    duration: float,
    seed: int = 42,
    requests: int = 160,
) -> Workload:
    """Two phases in turn, twice each, all present at the start: `requests` short ones over all adapters, for which
    adapters need most of the pool, and half as many long ones over two adapters, for which KV does. rate, duration: not
    used.

    Raises:
      ConfigError: a field is out of range.
    """
    shared = {"num_adapters": num_adapters, "ranks": ranks, "rate": rate, "duration": duration, "seed": seed}
    short = batch(**shared, requests=requests, input_range=(8, 17), output_range=(12, 13))
    long = batch(**shared, requests=requests // 2, used=2, input_range=(96, 161), output_range=(40, 41))
    half, quarter = requests // 2, requests // 4
    pieces = [(short, slice(half)), (long, slice(quarter)), (short, slice(half, None)), (long, slice(quarter, None))]
    columns = ("arrival", "adapter", "prompt_tokens", "output_tokens")
    joined = {name: np.concatenate([getattr(work, name)[part] for work, part in pieces]) for name in columns}
    return Workload(**joined, ranks=short.ranks)


def chats(
    *,
    num_adapters: int,
    ranks: Sequence[int],
    rate: float,
    duration: float,
    seed: int = 42,
    round_number: int = 0,
    requests: int = 160,
    chats: int = 64,
    turns: int = 6,
    message_tokens: int = 24,
    exponent: float = 0.9,
    output_range: tuple[int, int] = (12, 13),
) -> Workload:
    """`requests` turns of `chats` conversations, all present at the start.

    A turn's prompt is that of the turn before and `message_tokens` more; answers are no part of it, so that all systems
    get the same requests. After `turns` turns a conversation starts anew.

    Args:
      num_adapters: over which the conversations are spread evenly.
      rate, duration: not used.
      round_number: conversations continue where the round before left them.
      exponent: of the conversations' Zipf shares.

    Raises:
      ConfigError: a field is out of range.
    """
    positive = {"requests": requests, "chats": chats, "turns": turns, "message_tokens": message_tokens}
    check_arguments("chats", num_adapters=num_adapters, ranks=ranks, rate=rate, duration=duration, **positive)
    check_range("chats", output_range=output_range)
    random = np.random.default_rng(seed)
    chosen = random.choice(chats, (round_number + 1) * requests, p=zipf_shares(chats, exponent))
    taken = np.zeros(chats, int)
    turn = np.empty(len(chosen), int)
    for place, chat in enumerate(chosen.tolist()):
        turn[place] = taken[chat]
        taken[chat] += 1
    chosen, turn = chosen[-requests:], turn[-requests:]
    prompts = message_tokens * (turn % turns + 1)
    return Workload(
        arrival=np.zeros(requests),
        adapter=chosen * num_adapters // chats if num_adapters else np.full(requests, BASE),
        prompt_tokens=prompts,
        output_tokens=np.random.default_rng((seed, round_number)).integers(*output_range, requests),
        ranks=ranks_in_turn(num_adapters, ranks),
        prefix_text=turn // turns * chats + chosen,
        prefix_tokens=prompts,
    )
