"""The runner: one line a run, the same bytes for the same seed, resumed where it stopped."""

import json

import pytest

from experiments import run as runner
from experiments.config import make_experiment
from experiments.results_file import ResultsFile, read_results
from slora_jax import ConfigError

CONTENT = {
    "workload": {"rate": [1, 3], "duration": 4, "output_range": [8, 16]},
    "adapters": {"count": 3},
    "system": {"name": ["slora", "slora-paper"], "num_tokens": 4000},
}


@pytest.fixture
def config(tmp_path):
    file = tmp_path / "small.yaml"
    file.write_text(json.dumps(CONTENT))
    return file


def test_a_simulated_experiment_gives_the_same_bytes_again(config, tmp_path) -> None:
    outputs = [tmp_path / name for name in ("one.jsonl", "other.jsonl")]
    for output, workers in zip(outputs, ("1", "2"), strict=True):
        assert runner.main([str(config), "--output", str(output), "--workers", workers]) == 0
    first, second = (output.read_bytes() for output in outputs)
    assert first == second
    lines = [json.loads(line) for line in first.splitlines()]
    assert [(x["run"]["workload"]["rate"], x["run"]["system"]["name"]) for x in lines] == [
        (1.0, "slora"), (1.0, "slora-paper"), (3.0, "slora"), (3.0, "slora-paper"),
    ]  # fmt: skip
    assert all(line["metrics"]["completed"] == line["metrics"]["requests"] > 0 for line in lines)
    assert lines[0].keys() == {"key", "run", "metrics", "machine", "python", "versions", "git"}


def test_another_seed_gives_other_results(config, tmp_path) -> None:
    for seed in (1, 2):
        runner.main([str(config), f"seed={seed}", "--output", str(tmp_path / f"{seed}.jsonl"), "--workers", "1"])
    one, two = (read_results(tmp_path / f"{seed}.jsonl") for seed in (1, 2))
    assert not one.keys() & two.keys()
    assert [x["metrics"]["latency"] for x in one.values()] != [x["metrics"]["latency"] for x in two.values()]


def test_a_stopped_experiment_goes_on_where_it_was(tmp_path, monkeypatch) -> None:
    experiment = make_experiment("small", CONTENT)
    real, made = runner._simulated, []

    def simulated(config):
        if len(made) == 2:
            raise KeyboardInterrupt
        made.append(config.key)
        return real(config)

    monkeypatch.setattr(runner, "_simulated", simulated)
    with ResultsFile(tmp_path / "x.jsonl") as results, pytest.raises(KeyboardInterrupt):
        runner.run_experiment(experiment, results, progress=False)
    with (tmp_path / "x.jsonl").open("ab") as file:
        file.write(b'{"key": "torn')  # left by a killed process
    made.clear()
    with ResultsFile(tmp_path / "x.jsonl") as results:
        assert len(results) == 2
        runner.run_experiment(experiment, results, progress=False)
    assert made == [run.config.key for run in experiment.runs[2:]]
    assert list(read_results(tmp_path / "x.jsonl")) == [run.config.key for run in experiment.runs]
    with ResultsFile(tmp_path / "x.jsonl", fresh=True) as results:
        assert not results and (tmp_path / "x.jsonl").read_bytes() == b""


def test_a_file_is_not_opened_twice(tmp_path) -> None:
    """The lock is of the open file, so a second opening in this process is refused as one in another process is."""
    with ResultsFile(tmp_path / "x.jsonl"), pytest.raises(ConfigError, match="is open in another process"):
        ResultsFile(tmp_path / "x.jsonl")
    with ResultsFile(tmp_path / "x.jsonl") as reopened:
        assert not reopened


def test_a_foreign_line_is_refused_with_its_number(tmp_path) -> None:
    file = tmp_path / "x.jsonl"
    file.write_text('{"key": "a", "metrics": {}}\n{"other": 1}\n{"key": "b"}\n')
    with pytest.raises(ConfigError, match=r"x\.jsonl, line 2: is not the line of a run"):
        ResultsFile(file)
    assert file.read_text().count("\n") == 3


def test_a_run_that_does_not_fit_gives_a_line_and_exit_status_1(config, tmp_path, capsys) -> None:
    arguments = [str(config), "system.num_tokens=300", "workload.rate=1", "--output", str(tmp_path / "x.jsonl")]
    assert runner.main([*arguments, "--workers", "1"]) == 1
    lines = read_results(tmp_path / "x.jsonl").values()
    assert all("error" in line["metrics"] for line in lines)
    assert "2 with an error" in capsys.readouterr().out


def test_a_dry_run_prints_every_run_and_makes_none(config, tmp_path, capsys) -> None:
    assert runner.main([str(config), "--dry-run", "--output", str(tmp_path / "x.jsonl")]) == 0
    out = capsys.readouterr().out
    assert out.endswith("# small: 4 points, 4 runs\n") and out.count("num_tokens: 4000") == 4
    assert not (tmp_path / "x.jsonl").exists()


def test_runs_of_named_panels_only(config, tmp_path, capsys) -> None:
    config.write_text(json.dumps(CONTENT | {"cases": [{"panel": name} for name in ("first", "second", "third")]}))
    assert runner.main([str(config), "--dry-run", "--panel", "third", "--panel", "first"]) == 0
    out = capsys.readouterr().out
    assert out.endswith("8 points, 4 runs\n") and "panel: first" in out and "panel: second" not in out
    assert runner.main([str(config), "--panel", "secnd"]) == 2
    assert "--panel 'secnd' is unknown (did you mean 'second'?); there are ['first'," in capsys.readouterr().err


def test_a_wrong_config_is_one_line_and_status_2(config, capsys) -> None:
    assert runner.main([str(config), "workload.rte=3"]) == 2
    assert "workload.rte is unknown (did you mean 'rate'?)" in capsys.readouterr().err
