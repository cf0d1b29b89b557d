"""The results of an experiment in the order of its figure: panels, curves and points, with the published values."""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from experiments.config import Experiment, Run, load_experiment
from experiments.paper.published import Bar, published_row
from experiments.paper.results import PaperRow, load_rows
from experiments.simulator_fit import fitting_labels

PAPER = Path(__file__).parents[1] / "configs" / "paper"
SHARES = ("attainment", "satisfaction")
"""Metrics of which a deviation is a difference."""

SHORT = 1.0
"""Seconds. Published first-token latencies below this are a prefill or two, and compared by their difference."""


@dataclass(frozen=True)
class Point:
    """A run at its place of the axis. line: its result, whose metrics have "error" if the run could not be carried
    out."""

    run: Run
    at: Any
    line: Mapping[str, Any]
    published: PaperRow | Bar | None

    @property
    def metrics(self) -> Mapping[str, Any]:
        """Returns our figures."""
        return self.line["metrics"]  # type: ignore[no-any-return]

    @property
    def error(self) -> str | None:
        return self.metrics.get("error")

    @property
    def fitted(self) -> bool:
        """Returns whether the simulator's efficiencies were fitted to this published run."""
        simulated, published = self.run.config.mode == "simulated", self.published
        return simulated and isinstance(published, PaperRow) and published.label in _fitted_labels()

    def ours(self, metric: str) -> float | None:
        return self.metrics.get(metric)

    def theirs(self, metric: str) -> float | None:
        return None if self.published is None else getattr(self.published, metric, None)

    def deviation(self, metric: str) -> float | None:
        """Returns the relative deviation from the published value, or (`is_difference`) the difference."""
        ours, theirs = self.ours(metric), self.theirs(metric)
        if ours is None or theirs is None:
            return None
        return ours - theirs if self.is_difference(metric) else ours / theirs - 1

    def is_difference(self, metric: str) -> bool:
        theirs = self.theirs(metric)
        return metric in SHARES or (metric == "first_token_latency" and theirs is not None and theirs < SHORT)


@cache
def _fitted_labels() -> frozenset[str]:
    return frozenset(fitting_labels(load_rows()))


@dataclass(frozen=True)
class Curve:
    """A system, or one setting of it."""

    name: str
    points: tuple[Point, ...]


@dataclass(frozen=True)
class Panel:
    """Curves over one axis. title: "" in an experiment of one panel. x: the axis's field, by its dotted name."""

    title: str
    x: str
    curves: tuple[Curve, ...]

    def curve(self, name: str) -> Curve | None:
        return next((curve for curve in self.curves if curve.name == name), None)

    @property
    def places(self) -> list[Any]:
        """Returns the places of the axis: ascending numbers, or names in the order of the runs."""
        found = dict.fromkeys(point.at for curve in self.curves for point in curve.points)
        return sorted(found) if all(isinstance(at, int | float) for at in found) else list(map(str, found))

    @property
    def is_line(self) -> bool:
        """Returns whether the axis has at least three numbers; otherwise bars are drawn."""
        return len(self.places) > 2 and not isinstance(self.places[0], str)


@dataclass(frozen=True)
class Collected:
    """An experiment with its results. where: the commits, machines and versions of its lines, each once."""

    experiment: Experiment
    panels: tuple[Panel, ...]
    where: tuple[Mapping[str, Any], ...]

    def points(self) -> Iterator[Point]:
        for panel in self.panels:
            for curve in panel.curves:
                yield from curve.points

    def median_deviation(self, metric: str, curve: str | None = None) -> tuple[float, int] | None:
        """Returns the median of the absolute relative deviations and the number of points, of one curve or of all."""
        found = [
            abs(deviation)
            for panel in self.panels
            for one in panel.curves
            if curve in (None, one.name)
            for point in one.points
            if not point.is_difference(metric) and (deviation := point.deviation(metric)) is not None
        ]
        return (statistics.median(found), len(found)) if found else None


def published_figures() -> list[Collected]:
    """Returns the paper's figures and tables, by name, with the published values alone."""
    made = [load_experiment(file) for file in sorted(PAPER.glob("*.yaml"))]
    return [collect(one, {run.config.key: {"metrics": {}} for run in one.runs}) for one in made]


def collect(experiment: Experiment, lines: Mapping[str, Mapping[str, Any]]) -> Collected:
    """Collects the results of an experiment. lines: of `read_results`; runs that they lack are left out."""
    panels: dict[tuple[str, str], dict[str, list[Point]]] = {}
    where: list[Mapping[str, Any]] = []
    for run in experiment.runs:
        line = lines.get(run.config.key)
        if line is None:
            continue
        point = Point(run, run.config.value(run.x), line, published_row(run))
        panels.setdefault((run.panel, run.x), {}).setdefault(run.curve, []).append(point)
        place = {key: line[key] for key in ("git", "python", "versions", "machine", "date") if key in line}
        if place not in where:
            where.append(place)
    return Collected(
        experiment,
        tuple(
            Panel(title, x, tuple(Curve(name, tuple(points)) for name, points in curves.items()))
            for (title, x), curves in panels.items()
        ),
        tuple(where),
    )
