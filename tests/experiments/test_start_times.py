"""The command that measures starts."""

import pytest

from experiments.start_times import ROOT, cases, run, table


def test_a_start_is_measured_from_the_command_line_to_the_first_output(tmp_path):
    start = run(ROOT, tmp_path, ["--help"])
    assert 0 < start.answer_seconds <= start.end_seconds
    assert start.peak_mib > 5
    assert table({"help": {"here": start}}).split()[:2] == ["help", "here"]


def test_a_start_that_fails_is_not_a_measurement(tmp_path):
    with pytest.raises(RuntimeError, match="the server ended with status 2 before"):
        run(ROOT, tmp_path, ["serve", "nowhere"], ready="http://127.0.0.1:9/ready")


def test_first_and_second_starts_run_the_same_command():
    every = cases("model", 8000)
    for command in ("generate", "serve"):
        assert every[f"{command}, first start"] == every[f"{command}, second start"]
