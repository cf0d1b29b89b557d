"""Watches a server from outside, once a second, for growth."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import psutil

from experiments.serving.processes import Server

IN_USE = ("kv", "prefix_in_use", "adapter_in_use", "adapter_arriving")
"""Kinds of pages of which an idle engine has none."""
WATCHED = ("rss_mib", "file_handles", "threads")


@dataclass(frozen=True)
class Sample:
    """Memory, file handles (with sockets) and threads of the server's process, and pages of its pool by kind."""

    seconds: float
    rss_mib: float
    file_handles: int
    threads: int
    pages: dict[str, int]


class Watch:
    """Samples a server."""

    def __init__(self, server: Server) -> None:
        self._server, self._process = server, psutil.Process(server.pid)
        self._start = time.monotonic()
        self.samples: list[Sample] = []

    def sample(self) -> Sample:
        process = self._process
        with process.oneshot():
            one = Sample(
                round(time.monotonic() - self._start, 2),
                round(process.memory_info().rss / 2**20, 2),
                process.num_fds(),
                process.num_threads(),
                pool_pages(self._server),
            )
        self.samples.append(one)
        return one

    def run(self, is_over: Callable[[], bool], every: float = 1.0) -> None:
        """Samples until `is_over`."""
        while not is_over():
            self.sample()
            time.sleep(every)


def pool_pages(server: Server) -> dict[str, int]:
    """Returns the pages of the pool by kind, as the engine counted them last."""
    return {kind: int(count) for (kind,), count in server.metrics()["slora_pool_pages"].items()}


def growth(samples: Sequence[Sample], skip: float = 1 / 3) -> dict[str, Any]:
    """Returns, for each watched quantity: its value at the first and last sample after a share of `skip`, the slope per
    minute of a line fitted to these, and the slope's standard error."""
    kept = samples[round(len(samples) * skip) :]
    minutes = np.array([sample.seconds for sample in kept]) / 60
    found = {}
    for name in WATCHED:
        values = np.array([getattr(sample, name) for sample in kept], float)
        (slope, _), covariance = np.polyfit(minutes, values, 1, cov=True)
        found[name] = {
            "first": float(values[0]),
            "last": float(values[-1]),
            "most": float(values.max()),
            "per_minute": round(float(slope), 3),
            "standard_error": round(float(np.sqrt(covariance[0, 0])), 3),
        }
    return found
