"""The published runs that ours repeat."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

from experiments.config import Run
from experiments.paper.figure_8 import FIGURE_8
from experiments.paper.results import PaperRow, load_rows
from experiments.paper.settings import SETTINGS
from slora_jax import ConfigError

FIGURE_8_BARS = "figure 8: "


@dataclass(frozen=True)
class Bar:
    """A bar of figure 8, whose raw runs are not published. throughput: requests per second."""

    throughput: float


def published_row(run: Run) -> PaperRow | Bar | None:
    """Returns the row of the file that `run.published` names (or of "figure 8: " and a bar's name); None if it names
    none. Of repeated runs, the last one counts.

    Raises:
      ConfigError: the file has no such run.
    """
    if not run.published:
        return None
    if run.published.startswith(FIGURE_8_BARS):
        return _bar(run)
    found = [row for row in _by_file().get(run.published, ()) if _is_the_same(run, row)]
    if not found:
        raise ConfigError(f"published={run.published!r}: has no run with the workload of {run.panel!r}, {run.curve!r}")
    return found[-1]


def _bar(run: Run) -> Bar:
    config = run.config
    place = config.model_file, config.device, config.system.settings.get("tensor_parallel_size"), config.adapters.count
    for point in FIGURE_8:
        if (SETTINGS[point.setting].model_file, point.device, point.tp, point.num_adapters) == place:
            return Bar(getattr(point, run.published.removeprefix(FIGURE_8_BARS)))
    raise ConfigError(
        f"published={run.published!r}: figure 8 has no {run.panel!r} with tensor_parallel_size={place[2]}"
    )


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
