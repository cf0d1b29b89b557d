"""The report: what was published and what is ours, on one page that stands alone and fits a phone."""

import base64
import csv
import html
import json
import re
import shutil
import subprocess

import pytest

from experiments.config import make_experiment
from experiments.report.collect import collect
from experiments.report.page import page
from experiments.report.pictures import picture
from experiments.results_file import ResultsFile, read_results
from experiments.run import run_experiment

ABOUT = {
    "date": "2026-01-01",
    "command": "python -m experiments.report",
    "git": "abc",
    "machine": {"cpu": "a", "cores": 2},
}
PUBLISHED = "synthetic/slora/synthetic_num_adapters_a10g_S1_slora.jsonl"
CONTENT = {
    "title": "Two <systems>",
    "metrics": ["throughput", "latency"],
    "x": "adapters.count",
    "workload": {"rate": 2, "duration": 300},
    "adapters": {"count": [1, 20]},
    "cases": [
        {
            "panel": "A",
            "curve": "slora",
            "published": PUBLISHED,
            "system": {"name": "slora-paper", "num_tokens": 14500},
        },
        {"panel": "A", "curve": "packed", "system": {"name": "packed", "replicas": 3}},
        {
            "panel": "B",
            "x": "system.eviction",
            "curve": "slora",
            "workload": {"duration": 5},
            "adapters": {"count": 3},
            "system": {"name": "slora", "num_tokens": 3000, "eviction": ["lru", "immediate"]},
        },
    ],
}


@pytest.fixture(scope="module")
def collected(tmp_path_factory):
    experiment = make_experiment("figure_5", CONTENT)
    path = tmp_path_factory.mktemp("report") / "x.jsonl"
    with ResultsFile(path) as results:
        run_experiment(experiment, results, progress=False)
    return collect(experiment, read_results(path))


@pytest.fixture(scope="module")
def report(collected):
    return page([collected], [collected], [], ABOUT)


def test_points_stand_beside_the_published_ones(collected) -> None:
    panel = collected.panels[0]
    first = panel.curve("slora").points[0]
    assert (first.at, first.published.num_adapters, first.published.file) == (1, 1, PUBLISHED)
    assert first.theirs("throughput") == pytest.approx(1.83, abs=0.005)  # the paper's figure 5
    assert first.deviation("throughput") == first.ours("throughput") / first.theirs("throughput") - 1
    assert abs(first.deviation("throughput")) < 0.05
    assert first.deviation("attainment") == first.ours("attainment") - first.theirs("attainment")
    median, count = collected.median_deviation("throughput")
    assert count == 2 and median < 0.05
    assert "of memory" in panel.curve("packed").points[0].error
    assert collected.panels[1].curve("slora").points[0].published is None


def test_a_picture_has_every_panel(collected) -> None:
    whole, part = picture(collected), picture(collected, collected.panels[:1])
    assert whole.startswith(b"\x89PNG") and part.startswith(b"\x89PNG")
    width = [int.from_bytes(content[16:20]) for content in (whole, part)]
    assert width[0] > 1.5 * width[1]


def test_the_page_stands_alone_and_says_what_was_published(report, collected) -> None:
    assert not re.findall(r'(?:src|href)="(?!data:|#|https://arxiv\.org/)', report) and "<script" not in report
    assert report.count("data:image/png") == 4  # two panels, in two places
    assert "Two &lt;systems&gt;" in report and "Two <systems>" not in report
    cell = re.search(r"<td>1</td><td>([\d.]+) <span class=\"theirs\">\(([\d.]+), ([+-]\d+%)\)", report)
    assert cell is not None and cell[2] == "1.83"
    assert cell[1] == f"{collected.panels[0].curve('slora').points[0].ours('throughput'):.3g}"
    assert "out of memory" in report
    assert "1 of 1 hold in the published results, 1 of 1 hold in the simulation." in report
    assert "Holds if slora&#39;s throughput at the end of the axis is at least 0.8 times that at its start." in report


def test_every_picture_comes_as_svg_and_csv(report, collected) -> None:
    svg, table = (
        re.search(rf'download="figure_5-a.{kind}" href="data:[^,]*,([^"]+)"', report) for kind in ("svg", "csv")
    )
    assert svg is not None and base64.b64decode(svg[1]).startswith(b"<?xml")
    assert table is not None
    lines = list(csv.DictReader(base64.b64decode(table[1]).decode().splitlines()))
    first = collected.panels[0].curve("slora").points[0]
    assert [(line["curve"], line["adapters.count"]) for line in lines[:2]] == [("slora", "1"), ("slora", "20")]
    assert float(lines[0]["throughput"]) == first.ours("throughput")
    assert float(lines[0]["throughput_published"]) == first.theirs("throughput")
    assert {line["fitted"] for line in lines} == {"0"}
    assert "memory" in lines[2]["error"]


def test_fitted_points_are_marked_and_count_in_no_error(collected, monkeypatch) -> None:
    fitted = collected.panels[0].curve("slora").points[1].published.label
    monkeypatch.setattr("experiments.report.page._fitted", lambda: {fitted})
    marked = page([collected], [], [], ABOUT)
    assert re.search(r"<td>20</td><td>[\d.]+ \* <span", marked) and "over 1 points that were not fitted" in marked
    table = re.search(r'download="figure_5-a.csv" href="data:[^,]*,([^"]+)"', marked)
    assert table is not None
    lines = csv.DictReader(base64.b64decode(table[1]).decode().splitlines())
    assert [line["fitted"] for line in lines][:2] == ["0", "1"]


CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
MEASURE = """<script>addEventListener("load", () => {
  const right = document.body.getBoundingClientRect().right;
  const shown = [...document.querySelectorAll("body *")].filter(one => !one.closest(".scroll") && one.clientWidth);
  parent.document.title = JSON.stringify({
    beyond: shown.filter(one => one.getBoundingClientRect().right > right).map(one => one.tagName),
    broken: [...document.images].filter(image => !image.naturalWidth).length,
    width: innerWidth,
    narrowest: Math.min(...[...document.images].map(image => image.clientWidth)),
  }) })</script>"""


@pytest.mark.skipif(CHROMIUM is None, reason="no chromium to open the page with")
@pytest.mark.parametrize("width", [390, 1200])
def test_the_page_fits_a_phone_and_a_desk(report, tmp_path, width) -> None:
    file = tmp_path / "report.html"
    frame = (
        f'<iframe width="{width}" height="2000" style="border: 0" srcdoc="{html.escape(report + MEASURE)}"></iframe>'
    )
    file.write_text(f"<!doctype html><title></title>{frame}")  # a frame: chromium makes no window as narrow as a phone
    command = [CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path / 'profile'}"]
    command += ["--window-size=1300,2000", "--virtual-time-budget=3000", "--dump-dom", file.as_uri()]
    dom = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True).stdout
    measured = json.loads(html.unescape(re.search(r"<title>(\{.*?)</title>", dom)[1]))
    assert measured["beyond"] == [] and measured["broken"] == 0, measured
    assert measured["width"] == width and measured["narrowest"] >= 330
