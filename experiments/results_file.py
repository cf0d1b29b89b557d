"""Results as JSON lines, one per run: its config and metrics, the machine, versions and date."""

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

PACKAGES = {
    "simulated": ("jax", "numpy"),
    "real": ("jax", "jaxlib", "flax", "numpy"),
    "peft": ("jax", "jaxlib", "flax", "numpy", "torch", "transformers", "peft"),
    "load_test": ("jax", "jaxlib", "numpy", "fastapi", "uvicorn", "uvloop", "httptools", "locust"),
    "replicas": ("jax", "jaxlib", "numpy", "ray", "fastapi", "uvicorn", "httpx"),
}
"""Packages whose versions a result has, by `_packages`."""


class ResultsFile(Mapping[str, dict[str, Any]]):
    """The metrics of runs by the key of their config; open in one process at a time.

    Each line is written and flushed as a whole. An unfinished last line of a killed process is cut off at the next
    opening.
    """

    def __init__(self, path: Path, fresh: bool = False) -> None:
        """Opens the file. fresh: drops its lines.

        Raises:
          ConfigError: another process has the file open, or a line (before the last) is not one of a run.
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
            self.lines = read_results(path)
        except BaseException:
            self._file.close()
            raise
        self._file.seek(0)
        content = self._file.read()
        self._file.truncate(content.rfind(b"\n") + 1)

    def add(self, run: RunConfig, metrics: Mapping[str, Any], **more: Any) -> None:
        """Appends the line of a run. more: what a measured run has beside its metrics (`experiments.rounds`)."""
        line = {"key": run.key, "run": run.to_json(), "metrics": dict(metrics), **more, **_where(_packages(run))}
        self._file.write(json.dumps(line).encode() + b"\n")
        self._file.flush()
        os.fsync(self._file.fileno())
        self.lines[run.key] = line

    def __getitem__(self, key: str) -> dict[str, Any]:
        return self.lines[key]["metrics"]  # type: ignore[no-any-return]

    def __iter__(self) -> Any:
        return iter(self.lines)

    def __len__(self) -> int:
        return len(self.lines)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.close()


def read_results(path: Path) -> dict[str, dict[str, Any]]:
    """Returns the lines of a file by their keys; of a run made twice, the last. An unfinished last line is left out.

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


def _packages(run: RunConfig) -> str:
    peft = run.mode == "real" and run.system.name.startswith("peft")
    return "peft" if peft else run.mode if run.mode in PACKAGES else "real"


@cache
def _where(mode: str) -> dict[str, Any]:
    """Returns what a result depends on beside its config; a simulated one depends neither on the date nor on the
    machine's speed."""
    found = provenance(PACKAGES[mode])
    if mode == "simulated":
        del found["date"]
    return found
