"""Sections on the paper: its figures in miniature, and the simulator against its published runs."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from experiments.config import load_experiment
from experiments.report.collect import Collected, Curve, collect
from experiments.report.conclusions import CONCLUSIONS
from experiments.results_page.section import EXPERIMENTS, Json
from experiments.results_page.table import cell, percent, pick, table


def collect_results(folder: str, name: str, lines: Mapping[str, Any] | None = None) -> Collected:
    """An experiment with its results; without lines, with the paper's published values alone."""
    experiment = load_experiment(EXPERIMENTS / "configs" / folder / f"{name}.yaml")
    return collect(experiment, lines or {run.config.key: {"metrics": {}} for run in experiment.runs})


def miniature(results: Mapping[str, Mapping[str, Any]]) -> Iterable[str]:
    yield (
        "The paper's figures on the real engine, with a small model on a CPU. `make paper` writes the published and "
        "the simulated figures."
    )
    names = sorted(results, key=lambda name: (len(name), name))  # figure_5 before figure_10
    engine = {name: collect_results("miniature", name, results[name]) for name in names}
    yield "### The paper's conclusions"
    rows = []
    for one in CONCLUSIONS:
        published = one.verdict(collect_results("paper", one.experiment), "published")
        measured = one.verdict(engine[one.experiment], "ours")
        assert published is not None and measured is not None
        rows.append([one.sentence, one.experiment, published.holds, measured.holds, "; ".join(measured.numbers)])
    yield table("conclusion | experiment | holds as published | holds on the engine | engine's numbers", rows)
    for collected in engine.values():
        experiment = collected.experiment
        yield f"### {experiment.title}"
        yield experiment.about
        for panel in collected.panels:
            yield f"{panel.title}, over `{panel.x}`:"
            curves = [(curve, metric) for curve in panel.curves for metric in experiment.metrics]
            yield table(
                f"system | metric | {' | '.join(map(cell, panel.places))}",
                [[c.name, m.replace("_", " "), *(_value(c, at, m) for at in panel.places)] for c, m in curves],
            )


def _value(curve: Curve, at: Any, metric: str) -> Any:
    """A curve's value at a place of the axis; for a run that failed, the first words of its error."""
    for point in curve.points:
        if point.at == at:
            return point.error.partition(":")[0] if point.error else point.ours(metric)
    return None


def miniature_provenance(results: Mapping[str, Mapping[str, Any]]) -> Mapping[str, Any]:
    """That of the first run, with the dates of the first and of the last one."""
    runs = sorted((run for lines in results.values() for run in lines.values()), key=lambda run: run["date"])
    return runs[0] | {"date": f"{runs[0]['date']} to {runs[-1]['date']}"}


def simulator(data: Json) -> Iterable[str]:
    errors, left_out = data["held_out_errors"], data["left_out"]
    yield (
        f"{len(data['rows'])} of the paper's published runs, replayed with their exact requests; the other "
        f"{sum(one['rows'] for one in left_out)} are left out for the reasons below. The simulator's efficiencies were "
        f"fitted to {len(data['fitted_rows'])} runs, which count in no error. Errors of throughput and first token are "
        "relative, attainment's are differences."
    )
    rows = []
    for system, found in errors.items():
        first, attainment = pick(found, "first_token_latency.median attainment.median")
        throughput = pick(found, "throughput.median throughput.p90")
        rows.append([system, found["rows"], *map(percent, throughput), percent(first), attainment])
    columns = "throughput, median error | p90 | first token of 1 s or more, median error | attainment, median error"
    yield table(f"held-out runs | runs | {columns}", rows)
    yield "Throughput by device; a positive mean says that the simulator is too fast:"
    rows = []
    for system, found in errors.items():
        for device, one in found["by_device"].items():
            median, bias = pick(one["throughput"], "median bias")
            rows.append([system, device, one["rows"], percent(median), f"{bias:+.1%}"])
    yield table("system | device | runs | median error | mean signed error", rows)
    yield "Pairs of systems in the published order:"
    yield table("figure | in order | pairs", [pick(figure, "title right pairs") for figure in data["order"].values()])
    yield "Knees: the request rate at which a system falls behind. *Below* and *above*: outside the rates that ran."
    rows = []
    for knee in data["knees"]:
        rates = [knee[source]["rate"] or knee[source]["side"] for source in ("published", "simulated")]
        rows.append([knee["sweep"], *rates, percent(knee["error"])])
    yield table("sweep | published | simulated | error", rows)
    yield table("left out | runs | reason", [pick(one, "system rows reason") for one in left_out])
    yield table(
        "simulated run | virtual seconds per second of CPU time", data["virtual_seconds_per_cpu_second"].items()
    )
