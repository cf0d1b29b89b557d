"""The outcomes of requests: written by the clients, read by the load test."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

import psutil


@dataclass(frozen=True)
class CpuSeconds:
    """CPU time used by the engine's process, by that process's main thread (in a server: the event loop, all of HTTP),
    by the client's process, and by the whole machine."""

    engine: float
    main_thread: float
    client: float
    machine: float

    @classmethod
    def now(cls, engine: int, client: int | None = None) -> CpuSeconds:
        """Returns the seconds so far. engine, client: process ids."""
        process = psutil.Process(engine)
        main = next(thread for thread in process.threads() if thread.id == engine)
        return cls(
            _used(process),
            main.user_time + main.system_time,
            0.0 if client is None else _used(psutil.Process(client)),
            sum(psutil.cpu_times()[:3]) + sum(psutil.cpu_times()[5:7]),  # user, nice, system; irq, softirq
        )

    def since(self, before: CpuSeconds) -> CpuSeconds:
        return CpuSeconds(*(now - then for now, then in zip(_values(self), _values(before), strict=True)))


@dataclass(frozen=True)
class Answer:
    """A correct answer. first_token, last_token: seconds from the request's start."""

    token_ids: list[int]
    first_token: float
    last_token: float


@dataclass
class Answers:
    """The answers of a phase, by the requests' numbers.

    Attributes:
      seconds: from the first request to the last answer.
      answered: (number, answer) of the correctly answered requests.
      failures: descriptions of the other requests' failures.
    """

    seconds: float = 0.0
    cpu: CpuSeconds | None = None
    answered: list[tuple[int, Answer]] = field(default_factory=list)
    failures: list[str] = field(default_factory=list)

    @property
    def tokens(self) -> int:
        """Returns the generated tokens of the correct answers."""
        return sum(len(answer.token_ids) for _, answer in self.answered)

    def write(self, path: Path) -> None:
        path.write_text(json.dumps(asdict(self)))

    @classmethod
    def read(cls, path: Path) -> Answers:
        """Reads what `write` wrote. Raises FileNotFoundError: the clients did not finish."""
        data = json.loads(path.read_text())
        return cls(
            data["seconds"],
            CpuSeconds(**data["cpu"]),
            [(number, Answer(**answer)) for number, answer in data["answered"]],
            data["failures"],
        )


def _used(process: psutil.Process) -> float:
    times = process.cpu_times()
    return float(times.user + times.system)


def _values(seconds: CpuSeconds) -> Sequence[float]:
    return (seconds.engine, seconds.main_thread, seconds.client, seconds.machine)
