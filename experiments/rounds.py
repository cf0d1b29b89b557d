"""Runs side by side, in rounds: each round carries out every run once, so that a busy machine slows all of them.

One round before the timed ones warms up. In each round another run begins. Every round has new requests; pools and host
memory stay as the round before left them. A result has the figures of every round, their medians, and ratios within
rounds over a reference: the panel's first run at the same place of its axis, or the panel's first run.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from tqdm import tqdm

from experiments.config import Run, RunConfig
from slora_jax import SloraError

Figures = Mapping[str, Any]


@dataclass(frozen=True)
class Outcome:
    """A run, carried out once.

    Attributes:
      metrics: figures by name; None: of no requests.
      tokens: generated, by request, none for a failed one; None: unknown.
      details: further JSON values to keep.
      problems: what makes the result invalid, in words.
    """

    metrics: Figures
    tokens: Sequence[Sequence[int]] | None = None
    details: Mapping[str, Any] = field(default_factory=dict)
    problems: tuple[str, ...] = ()


Measure = Callable[[RunConfig, int], Outcome]
"""(run, round) -> outcome. Round 0 warms up; in it, a run with `measured.load` has all its requests at the start."""


def turns(
    names: Sequence[Any], rounds: int, title: str, warm_up: bool = True, order: Callable[[Any], Any] | None = None
) -> Iterator[tuple[int, Any]]:
    """Yields (round, name) in the order of the measurement, with a progress bar. Round 0 is the warm-up. order: the key
    by which a round's names are sorted when the round begins."""
    numbers = range(0 if warm_up else 1, rounds + 1)
    with tqdm(total=len(numbers) * len(names), desc=title, unit="run") as bar:
        for number in numbers:
            first = number % len(names)
            turn = [*names[first:], *names[:first]]
            for name in turn if order is None else sorted(turn, key=order):
                bar.set_postfix_str(str(name))
                yield number, name
                bar.update()


def medians(rounds: Sequence[Figures]) -> dict[str, Any]:
    """Returns the median of each figure over the rounds that have it; None if no round has."""
    values = {name: [one[name] for one in rounds if one.get(name) is not None] for name in rounds[0]}
    return {name: statistics.median(found) if found else None for name, found in values.items()}


def ratios(rounds: Sequence[Figures], reference: Sequence[Figures]) -> dict[str, float]:
    """Returns the median over the rounds of each figure over the reference's; figures that are 0 or None there lack."""
    return {
        name: statistics.median(own[name] / other[name] for own, other in zip(rounds, reference, strict=True))
        for name in rounds[0]
        if all(own.get(name) is not None and other.get(name) for own, other in zip(rounds, reference, strict=True))
    }


def different_requests(one: Sequence[Sequence[int]], other: Sequence[Sequence[int]]) -> list[int]:
    """Returns the numbers of the requests whose tokens differ."""
    return [number for number, (a, b) in enumerate(zip(one, other, strict=True)) if list(a) != list(b)]


def side_by_side(
    runs: Sequence[Run],
    measure: Measure,
    warm_up: bool = True,
    order: Callable[[RunConfig], Any] | None = None,
) -> list[dict[str, Any]]:
    """Measures the runs of a panel. Returns the parts of each run's result: `metrics` (medians, or the error),
    `rounds`, `over` (the ratios), `same_tokens` ([equal, compared] requests), `details` and `problems`. order: as in
    `turns`."""
    outcomes: list[list[Outcome]] = [[] for _ in runs]
    warm: dict[int, float] = {}
    errors: dict[int, str] = {}
    rounds = max(run.config.measured.rounds if run.config.measured else 1 for run in runs)
    key = None if order is None else lambda i: order(runs[i].config)
    for number, i in turns(range(len(runs)), rounds, runs[0].panel or runs[0].curve, warm_up, key):
        if i in errors:
            continue
        config = runs[i].config
        if number and warm and config.measured is not None and config.measured.load is not None:
            rate = config.measured.load * min(warm.values())
            config = replace(config, workload=replace(config.workload, rate=rate))
        try:
            outcome = measure(config, number)
        except SloraError as error:
            errors[i] = str(error)
            continue
        if number and config is not runs[i].config:
            outcome = replace(outcome, metrics={**outcome.metrics, "offered_rate": config.workload.rate})
        if number:
            outcomes[i].append(outcome)
        else:
            warm[i] = outcome.metrics["throughput"]
    return [
        {"metrics": {"error": errors[i]}} if i in errors else _result(runs, outcomes, i, set(errors))
        for i in range(len(runs))
    ]


def _result(runs: Sequence[Run], outcomes: Sequence[Sequence[Outcome]], i: int, failed: set[int]) -> dict[str, Any]:
    own, place = outcomes[i], runs[i].config.value(runs[i].x)
    reference = next(j for j in range(len(runs)) if j == i or runs[j].config.value(runs[j].x) == place)
    reference = 0 if reference == i else reference
    rounds = [dict(outcome.metrics) for outcome in own]
    result: dict[str, Any] = {"metrics": medians(rounds), "rounds": rounds}
    problems = [f"round {number}: {problem}" for number, outcome in enumerate(own, 1) for problem in outcome.problems]
    if reference not in failed and reference != i:
        at, others = runs[reference], outcomes[reference]
        result["over"] = {
            "curve": at.curve, "x": at.config.value(at.x), "ratios": ratios(rounds, [o.metrics for o in others]),
        }  # fmt: skip
        pairs = [(a.tokens, b.tokens) for a, b in zip(own, others, strict=True) if a.tokens and b.tokens]
        if len(pairs) == len(own) and all(len(a) == len(b) for a, b in pairs):
            different = [different_requests(a, b) for a, b in pairs]
            compared = sum(len(a) for a, _ in pairs)
            result["same_tokens"] = [compared - sum(map(len, different)), compared]
            for number, requests in enumerate(different, 1):
                if requests and runs[i].config.mode == "load_test":
                    count = f"{len(requests)} of {len(pairs[number - 1][0])}"
                    problems.append(f"round {number}: {count} requests have other tokens than {at.curve}'s: {requests}")
    details = [dict(outcome.details) for outcome in own]
    return result | ({"details": details} if any(details) else {}) | ({"problems": problems} if problems else {})
