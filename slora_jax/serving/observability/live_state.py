"""The live page's data: the engine now, and one sample a second of the last two minutes."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from slora_jax.adapters import Tier
from slora_jax.serving.observability.prometheus import ServerMetrics
from slora_jax.serving.observability.snapshot import EngineSnapshot

Status = Literal["starting", "ready", "draining", "failed"]

SAMPLES = 120
"""Samples kept, one a second."""

WINDOW = 60
"""Samples over which percentiles of latencies are computed."""

LATENCIES = ("first_token", "inter_token")
"""Histograms of `ServerMetrics`."""
PERCENTILES = tuple(f"{name}_{share}" for name in LATENCIES for share in ("p50", "p95"))


@dataclass
class Sample:
    """One second, and the state at its end.

    Attributes:
      time: seconds of `time.monotonic`.
      finished: requests finished since the start.
      counts: counts since the start of each histogram in `LATENCIES`.
      shown: values by name in the history; percentiles are in seconds, over the window that this sample ends.
    """

    time: float
    finished: int
    counts: dict[str, np.ndarray]
    shown: dict[str, float | None]


class LiveState:
    """Collects samples and builds the JSON of `/state`, both in the event loop."""

    def __init__(self, model: str, metrics: ServerMetrics) -> None:
        """Starts without samples.

        Args:
          model: name that the page shows.
          metrics: counts that are sampled.
        """
        self._model, self._metrics = model, metrics
        self._start = time.monotonic()
        self._first_counts = self._counts()
        self._samples: deque[Sample] = deque(maxlen=SAMPLES)
        self._snapshot: EngineSnapshot | None = None
        self._tiers: Mapping[str, Tier] = {}

    def sample(self, snapshot: EngineSnapshot | None, tiers: Mapping[str, Tier]) -> None:
        """Adds a sample; call it once a second.

        Args:
          snapshot: the engine's newest; None before the first. If it has not changed since the last call, the
            engine is stuck and the token rate is 0.
          tiers: result of `AdapterStore.tiers`.
        """
        if snapshot is None:
            return
        rate, before, stats = 0.0, self._snapshot, snapshot.stats
        if before is not None and snapshot.time > before.time:
            tokens = stats.tokens_generated - before.stats.tokens_generated
            rate = round(tokens / (snapshot.time - before.time), 1)
        shown: dict[str, float | None] = {"running": stats.running, "waiting": stats.waiting, "tokens_per_second": rate}
        counts = self._counts()
        past = self._samples[-WINDOW].counts if len(self._samples) >= WINDOW else self._first_counts
        for name in LATENCIES:
            percentiles = getattr(self._metrics, name).percentiles(counts[name] - past[name])
            shown |= dict(zip((f"{name}_p50", f"{name}_p95"), percentiles, strict=True))
        self._samples.append(Sample(time.monotonic(), self._metrics.num_finished, counts, shown))
        self._snapshot, self._tiers = snapshot, tiers

    def to_json(self, status: Status, detail: str | None = None) -> dict[str, Any]:
        """Returns the state as of the last sample.

        Args:
          detail: for people, why the service is not ready.

        Returns:
          model, status, detail; uptime_seconds.
          pool: `pages` in all, and by kind `kinds`; null before there is an engine, as are the next three.
          queue: `running` and `waiting` requests.
          adapters: names `registered`; contents by `states`.
          totals: since the start: requests `finished`, `generated_tokens`, `preemptions`, adapters' `loads`, `hits`,
            `evictions` and `upload_bytes`, `prefix_hit_tokens`.
          latency: over the last `window_seconds`, of requests that finished in it: `first_token_p50` and so on,
            seconds, null where nothing finished.
          history: lists of equal length, oldest first: `age_seconds` before now, `running`, `waiting`,
            `tokens_per_second`, and the same latencies.
        """
        snapshot, now = self._snapshot, time.monotonic()
        latency = {name: self._samples[-1].shown[name] for name in PERCENTILES} if self._samples else {}
        state: dict[str, Any] = {
            "model": self._model,
            "status": status,
            "detail": detail,
            "uptime_seconds": round(now - self._start, 1),
            **dict.fromkeys(("pool", "queue", "adapters", "totals")),
            "latency": {"window_seconds": WINDOW, **latency},
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

    def _counts(self) -> dict[str, np.ndarray]:
        return {name: getattr(self._metrics, name).counts for name in LATENCIES}

    def _history(self, now: float) -> dict[str, list[float | None]]:
        ages: list[float | None] = [round(now - sample.time, 1) for sample in self._samples]
        names = ("running", "waiting", "tokens_per_second", *PERCENTILES)
        return {"age_seconds": ages} | {name: [sample.shown[name] for sample in self._samples] for name in names}
