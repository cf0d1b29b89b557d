"""The loop of `slora train` on a fake trainer: steps, evaluation, early stopping, log, output, kill and resume."""

import json
import signal
from pathlib import Path

import numpy as np
import pytest
from fake_trainer import GEOMETRY, FakeTrainer, Killed

from slora_jax.adapters import read_peft
from slora_jax.training.checkpoint import Checkpoints
from slora_jax.training.curves import StepLog
from slora_jax.training.data import Dataset, Sample
from slora_jax.training.recipe import Recipe
from slora_jax.training.run import Course, Run, adapter_directory, schedule_factors

ADAPTERS = {
    "a": {"steps": 6, "batch_size": 2, "learning_rate": 0.5, "schedule": "linear"},
    "b": {"epochs": 1, "batch_size": 1, "learning_rate": 0.25, "seed": 1},
}


def recipe_of(output: Path, adapters: dict = ADAPTERS, **settings) -> Recipe:
    every = {"data": "unused", "lora": {"r": 2, "target_modules": ["q_proj"]}}
    named = {name: every | adapter for name, adapter in adapters.items()}
    return Recipe.from_mapping({"output": str(output), "adapters": named, "checkpoint_every": 2} | settings)


def sample(*tokens: int) -> Sample:
    return Sample(np.array(tokens, np.int32), np.arange(len(tokens)) > 0)


def make_run(recipe: Recipe, trainer: FakeTrainer, evaluation: tuple[int, ...] = ()) -> Run:
    examples = [sample(0, token, token + 1) for token in range(4)]
    held_out = [sample(0, token) for token in evaluation]
    recipe.output.mkdir(parents=True, exist_ok=True)
    checkpoints = Checkpoints(recipe.output / "checkpoints", recipe.conditions())
    data = dict.fromkeys(recipe.adapters, Dataset(examples, held_out))
    return Run(recipe, data, trainer, checkpoints, "base", progress=False)  # type: ignore[arg-type]


def log_of(recipe: Recipe) -> list[dict]:
    return [json.loads(line) for line in (recipe.output / "log.jsonl").read_text().splitlines()]


def written(recipe: Recipe) -> dict[str, bytes]:
    """Every file of the adapters, and the log."""
    files = [*(recipe.output / "adapters").rglob("*.*"), recipe.output / "log.jsonl"]
    return {str(file.relative_to(recipe.output)): file.read_bytes() for file in files if file.is_file()}


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> dict[str, bytes]:
    """The files of an uninterrupted run."""
    recipe = recipe_of(tmp_path_factory.mktemp("whole"))
    make_run(recipe, FakeTrainer()).run()
    return written(recipe)


def test_each_iteration_steps_every_adapter_with_steps_left(tmp_path) -> None:
    recipe = recipe_of(tmp_path)
    courses = make_run(recipe, FakeTrainer()).run()
    assert {name: (course.step, course.has_ended) for name, course in courses.items()} == {
        "a": (6, True),
        "b": (4, True),
    }
    lines = log_of(recipe)
    assert [(line["step"], line["adapter"]) for line in lines] == [
        *((step, name) for step in range(1, 5) for name in "ab"),
        *((step, "a") for step in (5, 6)),
    ]
    assert [line["tokens"] for line in lines[:2]] == [4, 2]
    assert [line["learning_rate"] for line in lines if line["adapter"] == "a"] == pytest.approx(
        [0.5 * (6 - step) / 6 for step in range(6)]
    )
    assert json.loads((adapter_directory(recipe, "a") / "adapter_config.json").read_text())["r"] == 2
    assert (recipe.output / "curves.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("dies_at", [1, 6, 9, 14, 18, 21])
def test_a_killed_run_ends_with_the_same_bytes(tmp_path, whole, dies_at) -> None:
    recipe = recipe_of(tmp_path)
    with pytest.raises(Killed):
        make_run(recipe, FakeTrainer(dies_at=dies_at)).run()
    make_run(recipe, FakeTrainer()).run()
    assert written(recipe) == whole


def test_a_finished_run_restores_removed_adapters(tmp_path, whole) -> None:
    recipe = recipe_of(tmp_path)
    make_run(recipe, FakeTrainer()).run()
    (adapter_directory(recipe, "a") / "adapter_config.json").unlink()
    make_run(recipe, trainer := FakeTrainer()).run()
    assert written(recipe) == whole and not trainer.gradients


def test_ctrl_c_stops_after_the_step_with_a_checkpoint(tmp_path, whole, capsys) -> None:
    class Interrupted(FakeTrainer):
        def optim_step(self, names):
            if self.steps["a"] == 2:
                signal.raise_signal(signal.SIGINT)
            return super().optim_step(names)

    recipe = recipe_of(tmp_path)
    with pytest.raises(KeyboardInterrupt):
        make_run(recipe, Interrupted()).run()
    assert "stopped after step 3 of 6" in capsys.readouterr().err
    assert len(log_of(recipe)) == 6
    run = make_run(recipe, FakeTrainer())
    assert run.iteration == 3
    run.run()
    assert written(recipe) == whole


def test_a_stopped_adapter_leaves_the_others_alone(tmp_path, whole, capsys) -> None:
    recipe = recipe_of(tmp_path)
    reason = "the gradient's norm is nan"
    courses = make_run(recipe, FakeTrainer({"b": (2, reason)})).run()
    assert (courses["b"].step, courses["b"].stopped, courses["a"].stopped) == (2, reason, None)
    assert "adapter 'b' is stopped at step 2: the gradient's norm is nan" in capsys.readouterr().err
    files = written(recipe)
    assert {name for name in files if name.startswith("adapters/b")} == set()
    assert all(content == whole[name] for name, content in files.items() if name.startswith("adapters/a"))
    [line] = [line for line in log_of(recipe) if "error" in line]
    assert (line["adapter"], line["step"], line["grad_norm"]) == ("b", 3, None)
    assert make_run(recipe, FakeTrainer()).courses["b"].stopped == reason  # after a restart, too


EARLY = {"e": {"steps": 50, "learning_rate": 0.5, "early_stopping": 2, "test": "unused", "batch_size": 4}}


@pytest.mark.parametrize("dies_at", [None, 10])
def test_early_stopping_writes_the_best_weights(tmp_path, dies_at) -> None:
    recipe = recipe_of(tmp_path, EARLY, evaluate_every=1)
    if dies_at is not None:
        with pytest.raises(Killed):
            make_run(recipe, FakeTrainer(dies_at=dies_at), (1,)).run()
    [course] = make_run(recipe, FakeTrainer(), (1,)).run().values()
    # The weight goes 0, 1, 1.5, 1.75 ... towards the training mean 2; the evaluation's optimum is 1.
    assert (course.step, course.best_step, course.best_loss) == (3, 1, 0.0)
    [weights] = read_peft(adapter_directory(recipe, "e"), GEOMETRY).a.values()
    assert (weights == 1).all()
    assert [line["evaluation_loss"] for line in log_of(recipe)] == [0.0, 0.5, 0.75]


def test_schedules_are_those_of_optax() -> None:
    assert schedule_factors("constant", 0, 3) == [1, 1, 1]
    assert schedule_factors("linear", 2, 6) == pytest.approx([0, 0.5, 1, 0.75, 0.5, 0.25])
    assert schedule_factors("cosine", 0, 4) == pytest.approx([1, 0.853553, 0.5, 0.146447], abs=1e-6)


def test_a_log_without_a_checkpoint_begins_anew(tmp_path) -> None:
    (tmp_path / "log.jsonl").write_text('{"half a li')
    log = StepLog(tmp_path / "log.jsonl", 0)
    log.write([{"loss": float("inf")}])
    assert (tmp_path / "log.jsonl").read_text() == '{"loss": null}\n'
    log.close()


def test_an_evaluation_without_a_number_is_no_improvement() -> None:
    course = Course(total=9)
    assert course.evaluated(1.0, 2) and not course.evaluated(float("nan"), 2) and not course.has_ended
    assert not course.evaluated(1.0, 2) and course.has_ended


def test_a_run_whose_adapters_are_all_stopped_ends(tmp_path) -> None:
    recipe = recipe_of(tmp_path, {"b": ADAPTERS["b"]})
    make_run(recipe, FakeTrainer({"b": (0, "its loss is nan")})).run()
    [course] = make_run(recipe, FakeTrainer()).run().values()
    assert course.stopped == "its loss is nan"
