"""What the live page shows, as JSON: the engine now, and a ring of samples of the last two minutes."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib import resources
from typing import Any, Literal

import numpy as np

from slora_jax.adapters import Tier
from slora_jax.engine import RequestOutput
from slora_jax.serving.observation import EngineSnapshot

Status = Literal["starting", "ready", "draining", "failed"]

SAMPLES = 120
"""Kept, one a second."""

WINDOW = 60
"""Samples that a latency percentile is over."""

_BOUNDS = np.geomspace(1e-5, 1e4, 400)  # seconds; each 5.3 % above the one before
_MIDDLES = np.concatenate([_BOUNDS[:1], np.sqrt(_BOUNDS[:-1] * _BOUNDS[1:]), _BOUNDS[-1:]])

CONTENT_TYPES = {
    "html": "text/html; charset=utf-8",
    "css": "text/css; charset=utf-8",
    "js": "text/javascript; charset=utf-8",
    "svg": "image/svg+xml",
}


def live_page_files() -> dict[str, tuple[bytes, str]]:
    """The files of the live page by name, with their content types; `index.html` names the others relative to itself.
    They run under the policy `default-src 'self'`."""
    files = resources.files("slora_jax.serving").joinpath("live_page").iterdir()
    return {f.name: (f.read_bytes(), CONTENT_TYPES[f.name.rsplit(".", 1)[-1]]) for f in files if f.is_file()}


class Latencies:
    """How often each latency was seen, within 3 %: constant size and cost, however many tokens a second."""

    def __init__(self) -> None:
        self.counts = np.zeros(_MIDDLES.size, np.int64)

    def add(self, seconds: Sequence[float] | np.ndarray) -> None:
        self.counts += np.bincount(np.searchsorted(_BOUNDS, seconds), minlength=_MIDDLES.size)


def percentiles(parts: Sequence[Latencies], quantiles: Sequence[float] = (0.5, 0.95)) -> list[float | None]:
    """Seconds that these shares of all latencies do not exceed (nearest rank); None where there are no latencies."""
    total = np.cumsum(sum((part.counts for part in parts), np.zeros(_MIDDLES.size, np.int64)))
    if not total[-1]:
        return [None] * len(quantiles)
    ranks = [max(1, int(np.ceil(q * total[-1]))) for q in quantiles]
    return [float(f"{_MIDDLES[int(np.searchsorted(total, rank))]:.3g}") for rank in ranks]


@dataclass
class Sample:
    """One second: what was in it, and the state at its end. time: of `time.monotonic`. finished: requests since the
    start. shown: latencies of the minute that it ends, by their names in the JSON."""

    time: float = 0.0
    running: int = 0
    waiting: int = 0
    finished: int = 0
    tokens_per_second: float = 0.0
    first_token: Latencies = field(default_factory=Latencies)
    inter_token: Latencies = field(default_factory=Latencies)
    shown: dict[str, float | None] = field(default_factory=dict)


class LiveState:
    """Collects samples and makes the JSON of `/state`. One thread calls it, the event loop's: `finished` for every
    request, `sample` once a second, `to_json` for every page that asks."""

    def __init__(self, model: str) -> None:
        """model: the name that the page shows."""
        self._model = model
        self._start = time.monotonic()
        self._samples: deque[Sample] = deque(maxlen=SAMPLES)
        self._current = Sample()
        self._snapshot: EngineSnapshot | None = None
        self._tiers: Mapping[str, Tier] = {}
        self._finished = 0

    def finished(self, output: RequestOutput) -> None:
        """A request has ended."""
        self._finished += 1
        first = output.metrics.first_token_latency
        if first is not None:
            self._current.first_token.add([first])
        if len(output.token_times) > 1:
            self._current.inter_token.add(np.diff(output.token_times))

    def sample(self, snapshot: EngineSnapshot | None, tiers: Mapping[str, Tier]) -> None:
        """A second has passed. snapshot: the engine's newest, None before there is one; tiers: of `AdapterStore.tiers`.
        A snapshot that is no newer than the last shows no tokens: the engine is stuck."""
        if snapshot is None:
            return
        sample, before = self._current, self._snapshot
        sample.time = time.monotonic()
        sample.finished = self._finished
        sample.running, sample.waiting = snapshot.stats.running, snapshot.stats.waiting
        if before is not None and snapshot.time > before.time:
            tokens = snapshot.stats.tokens_generated - before.stats.tokens_generated
            sample.tokens_per_second = round(tokens / (snapshot.time - before.time), 1)
        self._samples.append(sample)
        window = list(self._samples)[-WINDOW:]
        for name in ("first_token", "inter_token"):
            median, high = percentiles([getattr(one, name) for one in window])
            sample.shown |= {f"{name}_p50": median, f"{name}_p95": high}
        self._current = Sample()
        self._snapshot, self._tiers = snapshot, tiers

    def to_json(self, status: Status, detail: str | None = None) -> dict[str, Any]:
        """The state for the page, as of the last sample. detail: why, for people, when it is not ready.

        model, status, detail; uptime_seconds.
        pool: `pages` in all, and by kind `kinds`; null before there is an engine, as are the next three.
        queue: `running` and `waiting` requests.
        adapters: names `registered`; contents by `states`.
        totals: since the start: requests `finished`, `generated_tokens`, `preemptions`, adapters' `loads`, `hits`,
          `evictions` and `upload_bytes`, `prefix_hit_tokens`.
        latency: over the last `window_seconds`, of requests that finished in it: `first_token_p50` and so on, seconds,
          null where nothing finished.
        history: lists of equal length, oldest first: `age_seconds` before now, `running`, `waiting`,
          `tokens_per_second`, and the same latencies.
        """
        snapshot, now = self._snapshot, time.monotonic()
        state: dict[str, Any] = {
            "model": self._model,
            "status": status,
            "detail": detail,
            "uptime_seconds": round(now - self._start, 1),
            "pool": None,
            "queue": None,
            "adapters": None,
            "totals": None,
            "latency": {"window_seconds": WINDOW, **(self._samples[-1].shown if self._samples else {})},
            "history": self._history(now),
        }
        if snapshot is not None:
            stats = snapshot.stats
            state["pool"] = {"pages": sum(snapshot.pages.values()), "kinds": dict(snapshot.pages)}
            state["queue"] = {"running": stats.running, "waiting": stats.waiting}
            state["adapters"] = {"registered": stats.registered_adapters, "states": snapshot.states(self._tiers)}
            state["totals"] = {
                "finished": self._samples[-1].finished,
                "generated_tokens": stats.tokens_generated,
                "preemptions": stats.preemptions,
                "loads": stats.adapter_loads,
                "hits": stats.adapter_hits,
                "evictions": stats.adapter_evictions,
                "upload_bytes": stats.upload_bytes,
                "prefix_hit_tokens": stats.prefix_hit_tokens,
            }
        return state

    def _history(self, now: float) -> dict[str, list[float | None]]:
        samples = self._samples
        history: dict[str, list[float | None]] = {"age_seconds": [round(now - sample.time, 1) for sample in samples]}
        for name in ("running", "waiting", "tokens_per_second"):
            history[name] = [getattr(sample, name) for sample in samples]
        for name in ("first_token_p50", "first_token_p95", "inter_token_p50", "inter_token_p95"):
            history[name] = [sample.shown[name] for sample in samples]
        return history
