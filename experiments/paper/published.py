"""Runs of ours and the published runs that they repeat."""

from __future__ import annotations

from functools import cache

from experiments.config import Run
from experiments.paper.results import PaperRow, load_rows
from slora_jax import ConfigError


def published_row(run: Run) -> PaperRow | None:
    """The row of the file that `run.published` names; None where it names none. Repeated runs: the last.

    Raises:
      ConfigError: the file has no such run.
    """
    if not run.published:
        return None
    found = [row for row in _by_file().get(run.published, ()) if _is_the_same(run, row)]
    if not found:
        raise ConfigError(f"published={run.published!r}: has no run with the workload of {run.panel!r}, {run.curve!r}")
    return found[-1]


@cache
def _by_file() -> dict[str, list[PaperRow]]:
    rows: dict[str, list[PaperRow]] = {}
    for row in load_rows():
        rows.setdefault(row.file, []).append(row)
    return rows


def _is_the_same(run: Run, row: PaperRow) -> bool:
    workload = run.config.workload
    if (row.rate, row.duration) != (workload.rate, workload.duration):
        return False
    if row.workload == "real":
        return True
    own = {"alpha": 1.0, "cv": 1.0, "input_range": (8, 512), "output_range": (8, 512)} | dict(workload.parameters)
    published = row.num_adapters, row.alpha, row.cv, row.input_range, row.output_range
    return published == (run.config.adapters.count, *own.values())
