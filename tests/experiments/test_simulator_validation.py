"""The validation of the simulator: held-out rows, their errors, and a fit that finds its values."""

import json
from dataclasses import replace

import pytest

from experiments.paper.exclusions import exclusion
from experiments.paper.results import PaperRow
from experiments.simulated_rows import SimulatedRow, simulate_row
from experiments.simulator_fit import STAGES, Parameter, Stage, fit, fitting_labels, stage_rows
from experiments.simulator_validation import (
    QUICK_ROWS,
    SPEED_LABELS,
    Compared,
    compare,
    errors,
    errors_by_system,
    report,
    summary,
)
from slora_jax.simulation import load_device

ROW = PaperRow(
    file="synthetic/slora/synthetic_req_rate_a10g_S1_slora.jsonl",
    system="slora",
    device="a10g",
    setting="S1",
    workload="synthetic",
    num_adapters=4,
    alpha=1.0,
    rate=1.0,
    cv=1.0,
    duration=30.0,
    input_range=(8, 64),
    output_range=(8, 64),
    cluster=None,
    aborts=0,
    total_time=40.0,
    throughput=1.0,
    latency=10.0,
    first_token_latency=2.0,
    satisfaction=0.9,
    attainment=0.9,
)
OURS = SimulatedRow(
    throughput=1.1,
    latency=9.0,
    first_token_latency=1.0,
    attainment=0.95,
    satisfaction=0.9,
    aborts=0,
    simulated_seconds=40.0,
)


def test_a_row_is_simulated_the_same_every_time() -> None:
    first, second = simulate_row(ROW), simulate_row(ROW)
    assert first == second
    assert first.throughput > 0.5 and first.attainment == 1


def test_errors_are_of_held_out_rows_only() -> None:
    held_out, fitted = Compared(ROW, OURS, False), Compared(ROW, replace(OURS, throughput=9.0), True)
    (system,) = errors_by_system([held_out, fitted]).values()
    assert system["rows"] == 1
    assert system["throughput"] == {"count": 1, "median": 0.1, "p90": 0.1, "bias": 0.1}
    assert system["latency"]["bias"] == -0.1
    assert system["first_token_latency"]["median"] == 0.5
    assert system["attainment"]["median"] == 0.05


def test_a_short_first_token_latency_is_compared_in_seconds() -> None:
    light = Compared(replace(ROW, first_token_latency=0.3), replace(OURS, first_token_latency=0.2), False)
    measured = errors([light])
    assert measured["first_token_latency"]["count"] == 0
    assert measured["first_token_seconds_where_below_1_s"]["median"] == 0.1


def test_a_fit_finds_the_efficiency_that_made_the_runs() -> None:
    true = load_device("a10g").fitted("pytorch", layer_seconds=1.7e-3)
    ours = simulate_row(ROW, true)
    row = replace(ROW, throughput=ours.throughput, latency=ours.latency, first_token_latency=ours.first_token_latency)
    stage = Stage("a10g", "pytorch", (Parameter("layer_seconds", 1e-4, 4e-3),), ((row.file, 4, 1.0),))
    found = fit(stage, [row], load_device("a10g").fitted("pytorch", layer_seconds=1e-3), workers=1)
    assert found.values["layer_seconds"] == pytest.approx(1.7e-3, rel=0.01)
    assert abs(found.errors[row.label]["latency"]) < 0.01


def test_every_fitting_row_is_one_published_row_and_they_are_few(paper_rows) -> None:
    for stage in STAGES:
        for row in stage_rows(stage, paper_rows):
            assert row.device == stage.device
    with pytest.raises(ValueError, match="0 rows; a fitting row must be one"):
        stage_rows(replace(STAGES[0], rows=(("no/file.jsonl", 1, 2.0),)), paper_rows)
    used = [row for row in paper_rows if exclusion(row) is None]
    labels = fitting_labels(paper_rows)
    assert 10 <= len(labels) < 0.06 * len(used)


def test_other_measurements_of_a_fitted_run_are_not_held_out(paper_rows) -> None:
    labels = fitting_labels(paper_rows)
    again = [row for row in paper_rows if row.label == "slora a10g S2 n=200 R=2" and exclusion(row) is None]
    assert len(again) == 3 and all(row.label in labels for row in again)


def test_a_quick_validation_of_two_rows_has_every_part(paper_rows) -> None:
    rows = [row for row in paper_rows if (row.file, row.rate) in QUICK_ROWS]
    compared = compare(rows, paper_rows, workers=1)
    content = json.loads(json.dumps(report(compared, paper_rows)))
    assert set(content["held_out_errors"]) == {"slora", "slora, real workload (stand-in)"}
    assert len(content["rows"]) == 2 and not any(row["fitted"] for row in content["rows"])
    for row in content["rows"]:
        assert abs(row["throughput_error"]) < 0.1, row  # light load: as many as arrive
    assert set(content["virtual_seconds_per_cpu_second"]) == set(SPEED_LABELS)
    assert sum(part["rows"] for part in content["left_out"]) == 602
    assert "slora" in summary(content)
