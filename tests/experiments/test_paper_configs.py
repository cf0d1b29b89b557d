"""The paper's figures as configs: each run is the published one, and none is left out."""

from dataclasses import is_dataclass, replace
from pathlib import Path

import numpy as np
import pytest

import experiments
from experiments.config import load_experiment
from experiments.paper.figures import figures
from experiments.paper.published import published_row
from experiments.runners.workload import run_workload
from experiments.simulated_rows import row_policy, row_system, row_workload
from slora_jax import ConfigError
from slora_jax.scheduling import make_policy
from slora_jax.simulation import make_system

CONFIGS = Path(experiments.__file__).parent / "configs" / "paper"
FILES = [file for file in sorted(CONFIGS.glob("*.yaml")) if file.stem != "figure_8"]


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_every_point_is_the_published_run(file) -> None:
    compared = 0
    for run in load_experiment(file).runs:
        row = published_row(run)
        if row is None:
            continue
        compared += 1
        ours, theirs = run_workload(run.config), row_workload(row)
        for field in ("arrival", "adapter", "prompt_tokens", "output_tokens"):
            np.testing.assert_array_equal(getattr(ours, field), getattr(theirs, field), err_msg=row.label)
        assert ours.ranks == theirs.ranks and run.config.device == row.device, row.label
        system, published = make_system(run.config.system.name, **run.config.system.settings), row_system(row)
        assert system.memory_fraction == pytest.approx(published.memory_fraction)
        assert replace(system, memory_fraction=published.memory_fraction) == published, row.label
        policy = row_policy(row)
        own = None if run.config.system.policy is None else make_policy(**run.config.system.policy)
        assert type(own) is type(policy) and (not is_dataclass(own) or repr(own) == repr(policy)), row.label
    assert compared


def test_every_row_of_every_figure_has_its_run(paper_rows) -> None:
    for figure in figures(paper_rows):
        runs = load_experiment(CONFIGS / f"{figure.name}.yaml").runs
        ours = {row.label for run in runs if (row := published_row(run)) is not None}
        theirs = {row.label for panel in figure.panels for curve in panel.curves for row in curve.rows}
        assert theirs <= ours, (figure.name, sorted(theirs - ours))


def test_a_run_that_was_not_published_is_named() -> None:
    run = load_experiment(CONFIGS / "figure_6.yaml", ["workload.duration=17"]).runs[0]
    with pytest.raises(
        ConfigError, match=r"published='synthetic/.*': has no run with the workload of 'A10G S2', 'slora'"
    ):
        published_row(run)
