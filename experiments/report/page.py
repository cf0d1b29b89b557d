"""One self-contained HTML page of experiments: conclusions, pictures, tables, errors, provenance."""

from __future__ import annotations

import base64
import csv
import io
import json
import statistics
from collections.abc import Mapping, Sequence
from functools import cache
from typing import Any

import jinja2

from experiments.paper import PaperRow, load_rows
from experiments.report.collect import Collected, Panel, Point
from experiments.report.conclusions import CONCLUSIONS, contradictions
from experiments.report.pictures import X_LABELS, picture
from experiments.runners.figures import AXIS_LABELS
from experiments.simulator_fit import fitting_labels


def page(
    paper: Sequence[Collected], beyond: Sequence[Collected], miniature: Sequence[Collected], about: Mapping[str, Any]
) -> str:
    """The report. paper, beyond: simulated. miniature: on the engine, under the names of the paper's. about: date,
    command, revision and machine of the report itself."""
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("experiments.report"), autoescape=True, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters["json"] = lambda value: json.dumps(value, sort_keys=True)
    parts = [
        ("The paper, simulated on its hardware", "paper", [_section(one, "paper") for one in paper]),
        ("The paper in miniature, measured on the engine", "miniature", [_section(m, "miniature") for m in miniature]),
        ("Beyond the paper, simulated", "beyond", [_section(one, "beyond") for one in beyond]),
    ]
    simulated = {one.experiment.name: one for one in paper}
    conclusions = _conclusions(simulated, {one.experiment.name: one for one in miniature})
    return environment.get_template("report.html.j2").render(
        parts=[part for part in parts if part[2]],
        conclusions=conclusions,
        holds={label: _holds(conclusions, label) for label in ("published", "simulated", "engine")},
        median=_median_deviation(paper),
        contradictions=list(contradictions(simulated)),
        errors=_errors(paper),
        about=about,
    )


def _conclusions(paper: Mapping[str, Collected], miniature: Mapping[str, Collected]) -> list[dict[str, Any]]:
    rows = []
    for conclusion in CONCLUSIONS:
        sources = (("published", paper, "published"), ("simulated", paper, "ours"), ("engine", miniature, "ours"))
        verdicts = {
            label: conclusion.verdict(collected[conclusion.experiment], source)
            for label, collected, source in sources
            if conclusion.experiment in collected
        }
        if verdicts:
            rows.append({"conclusion": conclusion, "verdicts": verdicts})
    return rows


def _holds(conclusions: Sequence[Mapping[str, Any]], label: str) -> tuple[int, int]:
    """Numbers of conclusions that hold, and that could be judged."""
    verdicts = [row["verdicts"].get(label) for row in conclusions]
    judged = [verdict for verdict in verdicts if verdict is not None]
    return sum(verdict.holds for verdict in judged), len(judged)


def _median_deviation(paper: Sequence[Collected]) -> tuple[float, int] | None:
    """The median of the absolute relative deviations of throughput, without the fitted points; and how many."""
    fitted = _fitted()
    found = [
        abs(deviation)
        for one in paper
        for point in one.points()
        if not _is_fitted(point, fitted) and (deviation := point.deviation("throughput")) is not None
    ]
    return (statistics.median(found), len(found)) if found else None


@cache
def _fitted() -> frozenset[str]:
    """Labels of the published runs that the simulator's efficiencies were fitted to."""
    return frozenset(fitting_labels(load_rows()))


def _is_fitted(point: Point, fitted: frozenset[str]) -> bool:
    simulated, published = point.run.config.mode == "simulated", point.published
    return simulated and isinstance(published, PaperRow) and published.label in fitted


def _errors(paper: Sequence[Collected]) -> list[dict[str, Any]]:
    """Per experiment and system, the median deviation from the published values."""
    rows = []
    for one in paper:
        names = dict.fromkeys(curve.name for panel in one.panels for curve in panel.curves)
        for name in names:
            cells = {metric: one.median_deviation(metric, name) for metric in ("throughput", "latency")}
            if any(cells.values()):
                rows.append({"title": one.experiment.title, "curve": name, **cells})
    return rows


def _section(one: Collected, kind: str) -> dict[str, Any]:
    return {
        "id": f"{kind}-{one.experiment.name}",
        "experiment": one.experiment,
        "panels": [_panel(one, panel) for panel in one.panels],
        "median": {m: one.median_deviation(m) for m in one.experiment.metrics},
        "where": one.where,
        "points": sum(1 for _ in one.points()),
    }


def _panel(one: Collected, panel: Panel) -> dict[str, Any]:
    files = {"png": picture(one, [panel]), "svg": picture(one, [panel], "svg"), "csv": _csv(one, panel)}
    published = any(point.published for curve in panel.curves for point in curve.points)
    tables = [_table(panel, metric, published) for metric in one.experiment.metrics]
    return {
        "panel": panel,
        "name": "-".join([one.experiment.name, *panel.title.lower().replace(",", "").split()]),
        "tables": tables,
        "published": published,
        **{kind: base64.b64encode(content).decode() for kind, content in files.items()},
    }


def _csv(one: Collected, panel: Panel) -> bytes:
    """A line for each point: ours, and what was published."""
    metrics, fitted = one.experiment.metrics, _fitted()
    text = io.StringIO()
    lines = csv.writer(text)
    columns = [name for metric in metrics for name in (metric, f"{metric}_published")]
    lines.writerow(["curve", panel.x, *columns, "fitted", "error"])
    for curve in panel.curves:
        for point in curve.points:
            values = [value for metric in metrics for value in (point.ours(metric), point.theirs(metric))]
            lines.writerow([curve.name, point.at, *values, int(_is_fitted(point, fitted)), point.error])
    return text.getvalue().encode()


def _table(panel: Panel, metric: str, published: bool) -> dict[str, Any]:
    named = panel.places and isinstance(panel.places[0], str)
    by_place = {
        (curve.name, str(point.at) if named else point.at): point for curve in panel.curves for point in curve.points
    }
    curves = [curve.name for curve in panel.curves]
    return {
        "label": AXIS_LABELS.get(metric, metric.replace("_", " ")),
        "x": X_LABELS.get(panel.x, panel.x),
        "curves": curves,
        "rows": [
            (at if isinstance(at, str) else f"{at:g}", [_cell(by_place.get((name, at)), metric) for name in curves])
            for at in panel.places
        ],
        "published": published,
    }  # fmt: skip


def _cell(point: Point | None, metric: str) -> dict[str, str]:
    if point is None:
        return {}
    if point.error is not None:
        short = "out of memory" if "memory" in point.error else "refused"
        return {"ours": short, "theirs": "", "deviation": "", "title": point.error}
    deviation = point.deviation(metric)
    text = "" if deviation is None else f"{deviation:+.3g}" if point.is_difference(metric) else f"{deviation:+.0%}"
    return {
        "ours": _number(point.ours(metric)) + (" *" if _is_fitted(point, _fitted()) else ""),
        "theirs": _number(point.theirs(metric)),
        "deviation": text,
        "title": "",
    }


def _number(value: float | None) -> str:
    if value is None:
        return ""
    return f"{value:.0f}" if abs(value) >= 100 else f"{value:.3g}"
