"""The paper's figures as configs: each run is the published one, and none is left out."""

import json
from dataclasses import is_dataclass, replace
from pathlib import Path

import numpy as np
import pytest

import experiments
from experiments.config import load_experiment
from experiments.paper import SETTINGS
from experiments.paper.arguments import pool_tokens
from experiments.paper.figure_8 import FIGURE_8
from experiments.paper.published import published_row
from experiments.paper.results import PaperRow
from experiments.runners.simulated import run_simulated
from experiments.runners.workload import run_workload
from experiments.simulated_rows import row_policy, row_system, row_workload
from slora_jax import ConfigError
from slora_jax.models import ModelConfig
from slora_jax.scheduling import make_policy
from slora_jax.simulation import ModelShape, load_device, make_system

CONFIGS = Path(experiments.__file__).parent / "configs" / "paper"
FILES = [file for file in sorted(CONFIGS.glob("*.yaml")) if file.stem != "figure_8"]


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_every_point_is_the_published_run(file) -> None:
    compared = 0
    for run in load_experiment(file).runs:
        row = published_row(run)
        if not isinstance(row, PaperRow):
            continue
        compared += 1
        ours, theirs = run_workload(run.config), row_workload(row)
        for field in ("arrival", "adapter", "prompt_tokens", "output_tokens"):
            np.testing.assert_array_equal(getattr(ours, field), getattr(theirs, field), err_msg=row.label)
        assert ours.ranks == theirs.ranks and run.config.device == row.device, row.label
        system, published = make_system(run.config.system.name, **run.config.system.settings), row_system(row)
        assert system.gpu_memory_utilization == pytest.approx(published.gpu_memory_utilization)
        assert replace(system, gpu_memory_utilization=published.gpu_memory_utilization) == published, row.label
        policy = row_policy(row)
        own = None if run.config.system.policy is None else make_policy(**run.config.system.policy)
        assert type(own) is type(policy) and (not is_dataclass(own) or repr(own) == repr(policy)), row.label
    assert compared


def test_figure_8_has_every_published_bar_and_pools_as_large_as_those_of_one_device() -> None:
    runs = load_experiment(CONFIGS / "figure_8.yaml").runs
    bars = sorted(bar.throughput for run in runs if (bar := published_row(run)) is not None)
    assert bars == sorted(x for p in FIGURE_8 for x in (p.slora, p.without_lora_communication, p.base))
    shape = ModelShape.of(ModelConfig.from_dict(json.loads(SETTINGS["S4"].model_file.read_text())))
    for device in ("a100-40", "a100-80"):
        used = shape.weight_bytes + pool_tokens(device, "S4") * shape.kv_bytes
        share = used / load_device(device).memory_bytes
        found = {run.config.system.settings["gpu_memory_utilization"] for run in runs if run.config.device == device}
        assert found == {round(share, 4)}


def test_in_figure_8_what_is_sent_and_computed_costs_throughput() -> None:
    overrides = ["workload.rate=4", "workload.duration=4", "system.tensor_parallel_size=2"]
    experiment = load_experiment(CONFIGS / "figure_8.yaml", overrides)
    runs = {
        r.curve: run_simulated(r.config)["throughput"] for r in experiment.runs if r.panel.endswith("40, 10 adapters")
    }
    assert runs["A cut by input"] <= runs["slora"] < runs["no LoRA communication"] < runs["base model only"]
    assert runs["A and B replicated"] < runs["no LoRA communication"]


def test_the_published_losses_by_communication_are_those_of_the_reference() -> None:
    losses = [1 - point.slora / point.without_lora_communication for point in FIGURE_8]
    assert (round(min(losses), 2), round(max(losses), 2)) == (0.18, 0.3)


def test_a_run_that_was_not_published_is_named() -> None:
    run = load_experiment(CONFIGS / "figure_6.yaml", ["workload.duration=17"]).runs[0]
    with pytest.raises(
        ConfigError, match=r"published='synthetic/.*': has no run with the workload of 'A10G S2', 'slora'"
    ):
        published_row(run)
