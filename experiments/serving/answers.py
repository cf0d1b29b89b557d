"""What came of the requests: written by whoever asked them, read by the comparison."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

import psutil


@dataclass(frozen=True)
class CpuSeconds:
    """CPU time used: of the process with the engine, of this process's main thread (in a server its event loop, all of
    HTTP), of the client's process, and of the whole machine."""

    engine: float
    main_thread: float
    client: float
    machine: float

    @classmethod
    def now(cls, engine: int, client: int | None = None) -> CpuSeconds:
        """So far. engine, client: process ids."""
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
    """To a request that was answered as it should be. Seconds from when it was sent."""

    token_ids: list[int]
    first_token: float
    last_token: float


@dataclass
class Answers:
    """Of a phase, by the requests' numbers in the order in which they were sent. seconds: from the first request to
    the last answer. failures: of those that were not answered as they should be, why."""

    seconds: float = 0.0
    cpu: CpuSeconds | None = None
    answered: list[tuple[int, Answer]] = field(default_factory=list)
    failures: list[str] = field(default_factory=list)

    @property
    def tokens(self) -> int:
        """Generated, of those answered as they should be."""
        return sum(len(answer.token_ids) for _, answer in self.answered)

    def write(self, path: Path) -> None:
        path.write_text(json.dumps(asdict(self)))

    @classmethod
    def read(cls, path: Path) -> Answers:
        """Raises FileNotFoundError: whoever asked did not come to the end."""
        data = json.loads(path.read_text())
        return cls(
            data["seconds"],
            CpuSeconds(**data["cpu"]),
            [(number, Answer(**answer)) for number, answer in data["answered"]],
            data["failures"],
        )


def different_tokens(one: Answers, other: Answers) -> list[int]:
    """Requests to which the two have different tokens, or which only one of them has answered."""
    ours, theirs = ({number: answer.token_ids for number, answer in found.answered} for found in (one, other))
    return sorted(number for number in ours.keys() | theirs.keys() if ours.get(number) != theirs.get(number))


def _used(process: psutil.Process) -> float:
    times = process.cpu_times()
    return float(times.user + times.system)


def _values(seconds: CpuSeconds) -> Sequence[float]:
    return (seconds.engine, seconds.main_thread, seconds.client, seconds.machine)
