"""The experiments beyond the paper: every config is complete, and its runs can be carried out."""

from pathlib import Path

import pytest

import experiments
from experiments.config import load_experiment
from experiments.runners.simulated import run_simulated
from slora_jax import ConfigError

CONFIGS = Path(experiments.__file__).parent / "configs"
FILES = sorted((CONFIGS / "beyond").glob("*.yaml"))
TRACE = CONFIGS / "traces" / "azure.yaml"


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_a_config_says_what_it_shows_and_a_short_run_of_each_curve_has_its_metrics(file) -> None:
    experiment = load_experiment(file, ["workload.duration=4"])
    assert experiment.title != experiment.name and experiment.about.endswith(".")
    assert experiment.metrics and experiment.expected_seconds
    last = {(run.panel, run.curve): run for run in experiment.runs}
    for run in last.values():
        if int(run.config.workload.rate * run.config.workload.duration) < 6:
            continue  # not one conversation; a dedicated device's few requests
        metrics = run_simulated(run.config)
        missing = [name for name in experiment.metrics if metrics.get(name) is None]
        assert not missing, (run.panel, run.curve, missing)
        assert run.config.value(run.x) is not None, run.x


def test_all_of_it_takes_minutes() -> None:
    assert sum(load_experiment(file).expected_seconds for file in FILES) < 300


def test_cost_is_the_price_of_the_time_by_the_tokens() -> None:
    run = load_experiment(CONFIGS / "beyond" / "cost.yaml", ["workload.duration=5", "dollars_per_hour=7.2"]).runs[0]
    metrics = run_simulated(run.config)
    tokens = metrics["token_throughput"] * metrics["wall_seconds"]
    assert metrics["dollars_per_million_tokens"] == pytest.approx(0.002 * metrics["wall_seconds"] / tokens * 1e6)
    with pytest.raises(ConfigError, match=r"dollars_per_hour=0\.0: must be positive"):
        load_experiment(CONFIGS / "beyond" / "cost.yaml", ["dollars_per_hour=0"])


def test_a_run_without_a_price_has_the_key_that_it_had_before_there_were_prices() -> None:
    run = load_experiment(CONFIGS / "paper" / "figure_6.yaml").runs[0].config
    assert "dollars_per_hour" not in run.to_json() and "dollars_per_million_tokens" not in run_simulated(run)


def test_the_trace_is_the_users_own(tmp_path) -> None:
    with pytest.raises(ConfigError, match=r"workload\.path: must be given"):
        load_experiment(TRACE)
    file = tmp_path / "trace.csv"
    lines = [f"2023-11-16 18:{minute:02}:00.5,{100 + minute},{10 + minute}" for minute in range(60)]
    file.write_text("\n".join(["TIMESTAMP,ContextTokens,GeneratedTokens", *lines]))
    for run in load_experiment(TRACE, [f"workload.path={file}", "workload.duration=5"]).runs[::5]:
        assert run_simulated(run.config)["requests"] == 10
