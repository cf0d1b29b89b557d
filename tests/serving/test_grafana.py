"""The Grafana dashboard queries metrics and labels that exist."""

import json
import re
from pathlib import Path

import pytest
from observed_engine import finished_request, recording
from prometheus_client.parser import text_string_to_metric_families

from slora_jax.serving.observability.prometheus import ServerMetrics

DASHBOARD = json.loads((Path(__file__).parents[2] / "docs" / "grafana.json").read_text())
PANELS = [panel for panel in DASHBOARD["panels"] if panel["type"] != "row"]
EXPRESSIONS = [target["expr"] for panel in PANELS for target in panel["targets"]]


@pytest.fixture(scope="module")
def samples():
    moment = recording().moments[100]
    metrics = ServerMetrics(lambda: moment.snapshot, lambda: moment.tiers)
    metrics.finished(finished_request("a"))
    metrics.http("/v1/models", "GET", 200, 0.1)
    metrics.refused("queue_full")
    text = metrics.render()[0].decode()
    metrics.close()
    return [sample for family in text_string_to_metric_families(text) for sample in family.samples]


def test_every_metric_of_the_dashboard_exists(samples) -> None:
    names = {sample.name for sample in samples}
    asked = {name for expression in EXPRESSIONS for name in re.findall(r"\b(?:slora|process)_\w+", expression)}
    assert len(EXPRESSIONS) > 40 and asked <= names, asked - names
    ours = {name for name in names if name.startswith("slora_")}
    counted = {name for name in ours if not name.endswith(("_created", "_sum", "_count"))}
    assert counted - asked == {"slora_uploads_in_flight", "slora_compilation_seconds_total"}  # all others are shown


def test_every_label_of_the_dashboard_exists(samples) -> None:
    labels = {sample.name: set(sample.labels) for sample in samples}
    for expression in EXPRESSIONS:
        for by, metric in re.findall(r"by \(([\w, ]+)\) \((?:rate\()?(\w+)", expression):
            assert set(by.split(", ")) <= labels[metric], expression


def test_counters_are_read_by_their_rate() -> None:
    for expression in EXPRESSIONS:
        for before, metric in re.findall(r"(\w+)\((slora_\w+(?:_total|_bucket))\b", expression):
            assert before in ("rate", "increase") or "after_ready" in metric or "faults" in metric, expression
        assert expression.count("(") == expression.count(")")


def test_the_dashboard_can_be_imported() -> None:
    assert DASHBOARD["schemaVersion"] >= 39 and DASHBOARD["uid"] and DASHBOARD["title"]
    variables = {variable["name"]: variable["type"] for variable in DASHBOARD["templating"]["list"]}
    assert variables == {"datasource": "datasource", "job": "query", "instance": "query"}
    assert {panel["datasource"]["uid"] for panel in PANELS} == {"${datasource}"}
    ids = [panel["id"] for panel in DASHBOARD["panels"]]
    assert len(ids) == len(set(ids))
    taken = set()
    for panel in DASHBOARD["panels"]:
        at = panel["gridPos"]
        cells = {(x, y) for x in range(at["x"], at["x"] + at["w"]) for y in range(at["y"], at["y"] + at["h"])}
        assert not cells & taken and at["x"] + at["w"] <= 24, panel["title"]
        taken |= cells
