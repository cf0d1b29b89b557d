"""Side by side: the same requests to engines that differ in one setting, in turn, round after round."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from tqdm import tqdm

from experiments.mechanisms.scale import Scale
from experiments.systems import Workload
from experiments.systems.serving import serve
from experiments.systems.workload import Run
from slora_jax import Delta, Engine, SamplingParams
from slora_jax.adapters import random_adapter
from slora_jax.memory import EvictionPolicy, Lru
from slora_jax.metrics import Distribution, RequestRecord, serving_metrics
from slora_jax.models import init_random

TARGETS = ("q", "k", "v", "o")

COUNTED = (
    "steps", "tokens_computed", "preemptions", "prompt_tokens", "prefix_hit_tokens", "adapter_loads", "adapter_hits",
    "prefetch_hits", "prefetches_wasted",
)  # fmt: skip
"""Counters of `EngineStats` whose growth in a round is reported."""

Figures = dict[str, float]


@dataclass(frozen=True)
class Side:
    """changes: to the engine's settings. eviction: makes the engine's policy."""

    name: str
    changes: Mapping[str, Any] = field(default_factory=dict)
    eviction: Callable[[], EvictionPolicy] = Lru


@dataclass(frozen=True)
class Load:
    """requests(round, rate): of a round; rate in requests per second, None: all there at the start. timed: whether they
    arrive over time. around: what holds meanwhile. groups: name -> adapters, whose requests are also measured apart;
    of "cold" and "hot" ones, by how many seconds the first token of the cold comes later, in the mean."""

    name: str
    requests: Callable[[int, float | None], Workload]
    timed: bool = False
    around: Callable[[], AbstractContextManager[None]] = nullcontext
    groups: Mapping[str, frozenset[str]] = field(default_factory=dict)


class Watched:
    """An engine, and the most requests that it ever had running at once."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self.most_running = 0

    def add_request(
        self, prompt: list[int], params: SamplingParams, adapter: str | None = None, request_id: str | None = None
    ) -> str:
        return self.engine.add_request(prompt, params, adapter, request_id)

    def cancel(self, request_id: str) -> bool:
        return self.engine.cancel(request_id)

    def has_work(self) -> bool:
        return self.engine.has_work()

    def step(self) -> list[Delta]:
        deltas = self.engine.step()
        self.most_running = max(self.most_running, len(self.engine.scheduler.running))
        return deltas


def make_engine(scale: Scale, side: Side) -> Engine:
    """An engine of a side, with the adapters "0", "1", ... registered in this order."""
    graphdef, params = init_random(scale.model, "float32", scale.seed)
    engine = Engine(scale.model, graphdef, params, replace(scale.engine, **side.changes), eviction=side.eviction())
    for i in range(scale.adapters):
        rank = scale.ranks[i % len(scale.ranks)]
        engine.load_adapter(f"{i}", random_adapter(engine.store.geometry, rank, TARGETS, seed=scale.seed + i))
    return engine


def side_by_side(scale: Scale, sides: Sequence[Side], loads: Sequence[Load], name: str) -> dict[str, Any]:
    """Runs every load on every side: one round that is not timed, then `scale.rounds`, in each of which the sides take
    turns, the first of them another one each time. Pools and host memory stay as the round before left them, and every
    round brings new requests.

    Returns, by load: figures of every round and side, their medians, the medians of each side's over the first's
    within the same round, and for how many requests the tokens are the first side's; JSON values.
    """
    with ExitStack() as stack:
        engines = {side.name: stack.enter_context(make_engine(scale, side)) for side in sides}
        results = {}
        with tqdm(total=len(loads) * (scale.rounds + 1) * len(sides), desc=name, unit="run") as bar:
            for load in loads:
                with load.around():
                    results[load.name] = _rounds(scale, engines, load, bar.update)
        for engine in engines.values():
            engine.check()
    return {"sides": {side.name: _described(side) for side in sides}, "loads": results}


def _rounds(scale: Scale, engines: Mapping[str, Engine], load: Load, done: Callable[[], object]) -> dict[str, Any]:
    names = list(engines)
    warm_up = {}
    for side in names:
        warm_up[side], _ = measure(engines[side], load, load.requests(0, None))
        done()
    rate = scale.load * min(figures["requests_per_second"] for figures in warm_up.values()) if load.timed else None
    rounds: dict[str, list[Figures]] = {side: [] for side in names}
    same = dict.fromkeys(names, 0)
    requests = 0
    for number in range(1, scale.rounds + 1):
        workload = load.requests(number, rate)
        tokens = {}
        for side in names[number % len(names) :] + names[: number % len(names)]:
            figures, run = measure(engines[side], load, workload)
            rounds[side].append(figures)
            tokens[side] = run.tokens
            done()
        requests += len(workload)
        for side in names:
            same[side] += sum(a == b for a, b in zip(tokens[side], tokens[names[0]], strict=True))
    return {
        "requests_per_second_offered": rate,
        "requests": requests,
        "requests_with_the_tokens_of_the_first": same,
        "rounds": rounds,
        "median": {side: _medians(values) for side, values in rounds.items()},
        "over_the_first": {side: _ratios(values, rounds[names[0]]) for side, values in rounds.items()},
    }


def measure(engine: Engine, load: Load, workload: Workload) -> tuple[Figures, Run]:
    """Serves a workload: seconds, requests per second, and how far the engine's counters went."""
    before = engine.stats()
    watched = Watched(engine)
    run = serve(watched, workload, lambda: None)
    after = engine.stats()
    metrics = serving_metrics(run.records)
    figures = {
        "requests_per_second": metrics.throughput,
        "tokens_per_second": metrics.token_throughput,
        "queue_mean": metrics.queue_time.mean,
        "most_running": watched.most_running,
        **_latencies("", run.records),
    }
    for group, adapters in load.groups.items():
        figures |= _latencies(f"{group}_", [record for record in run.records if record.adapter in adapters])
    if {"cold", "hot"} <= load.groups.keys():
        figures["cold_waits_longer"] = figures["cold_first_token_mean"] - figures["hot_first_token_mean"]
    for counter in COUNTED:
        figures[counter] = getattr(after, counter) - getattr(before, counter)
    return figures, run


def _latencies(prefix: str, records: Sequence[RequestRecord]) -> Figures:
    first = Distribution.of(record.first_token_latency or 0.0 for record in records)
    gaps = Distribution.of(gap for record in records for gap in record.inter_token_latencies.tolist())
    return {
        f"{prefix}first_token_mean": first.mean,
        f"{prefix}first_token_p50": first.p50,
        f"{prefix}first_token_p99": first.p99,
        f"{prefix}inter_token_p50": gaps.p50,
        f"{prefix}inter_token_p99": gaps.p99,
        f"{prefix}inter_token_max": gaps.maximum,
    }


def _medians(rounds: Sequence[Figures]) -> Figures:
    return {key: statistics.median(figures[key] for figures in rounds) for key in rounds[0]}


def _ratios(rounds: Sequence[Figures], first: Sequence[Figures]) -> Figures:
    """Medians over the rounds, of figures that are never 0 on the first side."""
    return {
        key: statistics.median(own[key] / other[key] for own, other in zip(rounds, first, strict=True))
        for key in rounds[0]
        if all(figures[key] for figures in first)
    }


def _described(side: Side) -> dict[str, Any]:
    policy = side.eviction()
    costs = getattr(policy, "costs", None)
    return {**side.changes, "eviction": type(policy).__name__} | ({} if costs is None else {"costs": asdict(costs)})
