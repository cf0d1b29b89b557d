"""The benchmark of training, in miniature."""

import json
from dataclasses import replace
from importlib import import_module

import pytest
from tiny_model import MEDIUM, PAGE_SIZE, TinyModel

from experiments.training_bench import __main__ as bench
from experiments.training_bench import publish
from experiments.training_bench.settings import QUICK, Cell
from experiments.training_bench.worker import MODULES
from slora_jax import EngineConfig

SYSTEMS = ("slora-jax", "peft", "stack")


class InProcess:
    """A worker's systems in this process."""

    def __init__(self, settings):
        module = import_module(f"experiments.training_bench.{MODULES[settings['system']]}")
        cell = Cell(**settings["cell"])
        self.system = module.System(settings["model"], settings["adapters"], cell, settings["system"])

    def __enter__(self):
        return self

    def __exit__(self, *_):
        pass

    def ask(self, message):
        losses = self.system.step(message["step"], message["adapters"])
        return {"seconds": 1.0, "cpu_seconds": 1.0, "losses": losses, "peak_mib": 1.0}


def test_all_systems_train_the_same_adapters_to_the_same_losses(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(bench, "running", lambda python, module, settings, log, environment: InProcess(settings))
    cell = replace(QUICK[0], adapters=2, warm_up=1, warm_up_adapters=2, systems=SYSTEMS)
    monkeypatch.setattr(bench, "QUICK", (cell,))
    bench.main(["--quick", "--rounds", "2", "--output", str(tmp_path / "training.json")])
    results = json.loads((tmp_path / "training.json").read_text())
    (cell,) = results["cells"]
    assert {"machine", "versions", "date"} <= cell["provenance"].keys()
    assert set(cell["results"]) == set(SYSTEMS)
    assert cell["largest_loss_difference"] < 1e-3
    assert "stack" in capsys.readouterr().out


def test_a_loss_that_is_not_a_number_is_a_difference():
    steps = {"ours": [{"losses": [1.0, float("nan")]}], "theirs": [{"losses": [1.0, 1.0]}]}
    assert bench.largest_difference(steps) != pytest.approx(0)
    assert not bench.largest_difference(steps) <= bench.TOLERANCE


def test_publishing_compiles_nothing_and_both_ways_are_timed(tmp_path, monkeypatch):
    shape = {"dtype": "float32", "page_size": PAGE_SIZE, "progress": False, **MEDIUM}
    monkeypatch.setattr(publish, "EngineConfig", lambda **_: EngineConfig(**shape))
    monkeypatch.setattr(publish, "RANKS", publish.RANKS[:2])  # the third is above this shape's
    TinyModel().save(tmp_path)
    publish.main(["--model", str(tmp_path), "--rounds", "1", "--output", str(tmp_path / "publish.json")])
    results = json.loads((tmp_path / "publish.json").read_text())
    assert results["compilations"] == 0
    assert all(
        0 < way["call"] < way["to_first_token"]
        for one in results["adapters"].values()
        for way in (one["publish"], one["files"])
    )
