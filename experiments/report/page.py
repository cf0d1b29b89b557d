"""One self-contained HTML page of experiments: conclusions, pictures, tables, errors, provenance."""

from __future__ import annotations

import base64
import csv
import io
import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

import jinja2

from experiments.report.collect import Collected, Panel, Point
from experiments.report.conclusions import CONCLUSIONS, contradictions
from experiments.report.pictures import X_LABELS, picture
from experiments.runners.figures import AXIS_LABELS


def page(
    paper: Sequence[Collected], beyond: Sequence[Collected], miniature: Sequence[Collected], about: Mapping[str, Any]
) -> str:
    """Returns the report.

    Args:
      paper, beyond: simulated results.
      miniature: results of the engine, under the names of the paper's.
      about: date, command, revision and machine of the report itself.
    """
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
    return environment.get_template("report.html.j2").render(
        parts=[part for part in parts if part[2]],
        conclusions=(rows := _conclusions(simulated, {one.experiment.name: one for one in miniature})),
        summary=_summary(rows),
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


def _summary(rows: Sequence[Mapping[str, Any]]) -> str:
    """Returns the number of conclusions that hold, per source, in a sentence."""
    texts = []
    for label, source in (
        ("published", "the paper's raw results"),
        ("simulated", "the simulator"),
        ("engine", "the engine"),
    ):
        holds = [row["verdicts"][label].holds for row in rows if row["verdicts"].get(label)]
        texts += [f"{sum(holds)} of {len(holds)} in {source}"] if holds else []
    return f"Of the paper's conclusions, these hold: {', '.join(texts)}." if texts else ""


def _errors(paper: Sequence[Collected]) -> list[dict[str, Any]]:
    """Returns the median deviation from the published values, per experiment and system."""
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
    points = [point for curve in panel.curves for point in curve.points]
    published = any(point.published for point in points)
    return {
        "panel": panel,
        "name": "_".join(re.findall(r"\w+", f"{one.experiment.name} {panel.title}")),
        "image": _encoded(picture(one, [panel])),
        "svg": _encoded(picture(one, [panel], "svg")),
        "csv": _encoded(table_csv(one, [panel]).encode()),
        "tables": [_table(panel, metric, published) for metric in one.experiment.metrics],
        "published": published,
        "fitted": any(point.is_fitted for point in points),
    }


def _encoded(content: bytes) -> str:
    return base64.b64encode(content).decode()


def table_csv(one: Collected, panels: Sequence[Panel]) -> str:
    """Returns the points as CSV: panel, curve, field and value of the axis, then each metric, ours and published."""
    metrics, text = one.experiment.metrics, io.StringIO()
    writer = csv.writer(text)
    columns = [name for metric in metrics for name in (metric, f"{metric}, published")]
    writer.writerow(["panel", "curve", "axis", "at", *columns, "fitted", "error"])
    for panel in panels:
        for curve in panel.curves:
            for point in curve.points:
                values = [value for metric in metrics for value in (point.ours(metric), point.theirs(metric))]
                writer.writerow([panel.title, curve.name, panel.x, point.at, *values, point.is_fitted, point.error])
    return text.getvalue()


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


def _cell(point: Point | None, metric: str) -> dict[str, Any]:
    if point is None:
        return {}
    if point.error is not None:
        short = "out of memory" if "memory" in point.error else "refused"
        return {"ours": short, "theirs": "", "deviation": "", "title": point.error, "fitted": False}
    deviation = point.deviation(metric)
    text = "" if deviation is None else f"{deviation:+.3g}" if point.is_difference(metric) else f"{deviation:+.0%}"
    return {
        "ours": _number(point.ours(metric)),
        "theirs": _number(point.theirs(metric)),
        "deviation": text,
        "title": "",
        "fitted": point.is_fitted,
    }


def _number(value: float | None) -> str:
    if value is None:
        return ""
    return f"{value:.0f}" if abs(value) >= 100 else f"{value:.3g}"
