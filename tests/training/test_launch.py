"""`slora train` on a tiny model: losses, adapters, a kill and its resumption, and errors before the model is loaded."""

import fcntl
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml
from tiny_model import SHARED_PROGRAMS, TinyModel

from slora_jax import cli
from slora_jax.adapters import read_peft
from slora_jax.errors import ConfigError
from slora_jax.training import launch
from slora_jax.training.recipe import Recipe

RECIPE = {
    "output": "out",
    "checkpoint_every": 2,
    "evaluate_every": 2,
    "defaults": {
        "lora": {"r": 4, "target_modules": ["q_proj", "down_proj"]},
        "batch_size": 2,
        "learning_rate": 0.05,
        "evaluation": 0.3,
    },
    "adapters": {
        "plain": {"data": "plain.jsonl", "steps": 6},
        "chat": {"data": "chat.jsonl", "epochs": 1, "lora": {"rank_pattern": {"q_proj": 2}}, "early_stopping": 2},
    },
}


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    directory = tmp_path_factory.mktemp("models") / "Tiny"
    directory.mkdir()
    return TinyModel().save(directory)


def prepare(directory: Path, **changes) -> Path:
    """Writes the data and the recipe."""
    plain = [{"prompt": f"{number}", "completion": " fox"} for number in range(6)]
    chat = [
        {"messages": [{"role": "user", "content": f"{number}"}, {"role": "assistant", "content": "dog"}]}
        for number in range(6)
    ]
    for name, lines in (("plain", plain), ("chat", chat)):
        (directory / f"{name}.jsonl").write_text("\n".join(map(json.dumps, lines)))
    (directory / "recipe.yaml").write_text(yaml.safe_dump(RECIPE | changes, sort_keys=False))
    return directory / "recipe.yaml"


def outputs(directory: Path) -> dict[str, bytes]:
    files = (directory / "log.jsonl", *(directory / "adapters").rglob("*.*"))
    return {str(file.relative_to(directory)): file.read_bytes() for file in files}


@pytest.fixture(scope="module")
def whole(model, tmp_path_factory) -> Path:
    """The output of an uninterrupted run."""
    directory = tmp_path_factory.mktemp("whole")
    assert cli.main(["train", str(model), "--config", str(prepare(directory))]) == 0
    return directory / "out"


def test_the_adapters_learn_and_are_plain_peft_directories(whole) -> None:
    lines = [json.loads(line) for line in (whole / "log.jsonl").read_text().splitlines()]
    for name, rank, steps in (("plain", 4, 6), ("chat", 2, 2)):
        losses = [line["loss"] for line in lines if line["adapter"] == name]
        assert len(losses) == steps and losses[-1] < losses[0]
        adapter = read_peft(whole / "adapters" / name, TinyModel().geometry)
        assert adapter.a[0, "q"].shape == (rank, 32) and adapter.b[0, "q"].any()
        assert adapter.config.base_model_name_or_path == "tiny"


def test_a_run_killed_and_started_again_ends_with_the_same_bytes(model, whole, tmp_path) -> None:
    recipe, log = prepare(tmp_path), tmp_path / "out/log.jsonl"
    arguments = ["train", str(model), f"--config={recipe}"]
    command = [sys.executable, "-c", "from slora_jax.cli import main; main()", *arguments]
    with subprocess.Popen(command, env=os.environ | SHARED_PROGRAMS, stderr=subprocess.DEVNULL) as process:
        while process.poll() is None and not (log.exists() and log.read_bytes().count(b"\n") >= 6):
            time.sleep(0.01)
        process.send_signal(signal.SIGKILL)
    assert process.returncode == -signal.SIGKILL
    assert cli.main(arguments) == 0
    assert outputs(tmp_path / "out") == outputs(whole)


def test_a_checkpoint_of_another_recipe_is_refused_unless_restarted(model, whole, tmp_path, monkeypatch) -> None:
    shutil.copytree(whole / "checkpoints", tmp_path / "out/checkpoints")
    recipe = Recipe.from_file(prepare(tmp_path, max_length=100))
    with pytest.raises(ConfigError, match=r"checkpoint of step 6 .* another recipe: max_length was None, is 100 now"):
        launch.train(model, recipe)
    recipe = Recipe.from_file(prepare(tmp_path))
    (tmp_path / "plain.jsonl").write_text('{"prompt": "", "completion": "x"}\n' * 6)
    with pytest.raises(ConfigError, match=r"adapters.plain.data was"):
        launch.train(model, recipe)
    monkeypatch.setattr(launch.Trainer, "from_pretrained", None)  # not callable
    with pytest.raises(TypeError):
        launch.train(model, recipe, restart=True)
    assert not [*(tmp_path / "out/checkpoints").iterdir()]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"max_length": 129}, "max_length=129: the model has 128 positions"),
        (
            {"defaults": RECIPE["defaults"] | {"lora": {"target_modules": ["lm_head"]}}},
            "adapters.plain.lora.target_mod",
        ),
        ({"adapters": {"a": {"data": "none.jsonl", "steps": 1}}}, "none.jsonl: cannot be read: No such file"),
        ({"adapters": {"a": {"data": "plain.jsonl", "steps": 1}}, "max_length": 2}, "leaves no example to train on"),
        ({"output": "plain.jsonl"}, "cannot be written"),
        ({"output": "locked"}, "another process is training into it"),
    ],
)
def test_mistakes_are_errors_before_the_model_is_loaded(model, tmp_path, monkeypatch, changes, message) -> None:
    monkeypatch.setattr(launch.Trainer, "from_pretrained", None)
    recipe = Recipe.from_file(prepare(tmp_path, **changes))
    (tmp_path / "locked").mkdir()
    with open(tmp_path / "locked/.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(ConfigError) as raised:
            launch.train(model, recipe)
    assert message in str(raised.value)
