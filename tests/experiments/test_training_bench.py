"""The benchmark of training, in miniature."""

import json

import pytest

from experiments.training_bench.__main__ import largest_difference, main


def test_all_systems_train_the_same_adapters_to_the_same_losses(tmp_path, capsys):
    main(["--quick", "--rounds", "1", "--output", str(tmp_path / "training.json")])
    results = json.loads((tmp_path / "training.json").read_text())
    assert {"machine", "versions", "date"} <= results["provenance"].keys()
    for cell in results["cells"]:
        assert set(cell["results"]) == set(cell["systems"])
        assert cell["largest_loss_difference"] < 1e-3
        for system in cell["results"].values():
            assert len(system["tokens_per_second"]["rounds"]) == 1 and system["peak_mib"] > 0
    assert "ragged_dot" in capsys.readouterr().out


def test_a_loss_that_is_not_a_number_is_a_difference():
    steps = {"ours": [{"losses": [1.0, float("nan")]}], "theirs": [{"losses": [1.0, 1.0]}]}
    assert largest_difference(steps) != pytest.approx(0)
    assert not largest_difference(steps) <= 1e-3
