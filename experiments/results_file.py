"""Results as JSON lines: one a run, appended safely."""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from experiments.config.schema import RunConfig
from experiments.machine import provenance
from slora_jax import ConfigError


class ResultsFile(Mapping[str, dict[str, Any]]):
    """The metrics of runs, by the key of their config; open in one process at a time.

    A line is written and flushed as a whole. What a killed process left of its last one is cut off when the file is
    opened again.
    """

    def __init__(self, path: Path, fresh: bool = False) -> None:
        """fresh: forget the lines that are there.

        Raises:
          ConfigError: another process has it open; a line (before the last) is not one of a run.
        """
        self.path = path
        path.parent.mkdir(parents=True, exist_ok=True)
        self._file = path.open("a+b")
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            self._file.close()
            raise ConfigError(f"{path}: is open in another process; wait for it, or give another --output") from error
        if fresh:
            self._file.truncate(0)
        try:
            self._lines = read_results(path)
        except BaseException:
            self._file.close()
            raise
        self._file.seek(0)
        content = self._file.read()
        self._file.truncate(content.rfind(b"\n") + 1)

    def add(self, run: RunConfig, metrics: Mapping[str, Any]) -> None:
        line = {"key": run.key, "run": run.to_json(), "metrics": dict(metrics), **_where(run.mode)}
        self._file.write(json.dumps(line).encode() + b"\n")
        self._file.flush()
        os.fsync(self._file.fileno())
        self._lines[run.key] = line

    def __getitem__(self, key: str) -> dict[str, Any]:
        return self._lines[key]["metrics"]  # type: ignore[no-any-return]

    def __iter__(self) -> Any:
        return iter(self._lines)

    def __len__(self) -> int:
        return len(self._lines)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.close()


def read_results(path: Path) -> dict[str, dict[str, Any]]:
    """The lines of a file by their keys; of runs made twice, the last. A last line without an end is left out.

    Raises:
      ConfigError: a line is not one of a run.
    """
    lines: dict[str, dict[str, Any]] = {}
    content = path.read_bytes()
    for number, text in enumerate(content[: content.rfind(b"\n") + 1].splitlines(), 1):
        try:
            line = json.loads(text)
            lines[line["key"]] = line
        except (ValueError, KeyError, TypeError) as error:
            raise ConfigError(f"{path}, line {number}: is not the line of a run ({error!r}); remove it") from error
    return lines


@cache
def _where(mode: str) -> dict[str, Any]:
    """What a result depends on beside its config; a simulated one neither on the date nor on the machine's speed."""
    found = provenance(("jax", "numpy") if mode == "simulated" else ("jax", "jaxlib", "flax", "numpy"))
    if mode == "simulated":
        del found["date"]
    return found
