"""The config file of `slora train`: merged defaults, and errors that name the field."""

import json
from pathlib import Path

import pytest

from slora_jax.errors import ConfigError
from slora_jax.training.recipe import Recipe

WHOLE = """
output: out
max_length: 64
defaults:
  data: all.jsonl
  lora: {r: 8, lora_alpha: 16, target_modules: [q_proj, v_proj]}
  epochs: 3
  evaluation: 0.1
  learning_rate: 1e-3
adapters:
  plain: {}
  own: {data: own.jsonl, test: test.jsonl, steps: 5, lora: {r: 16, rank_pattern: {v_proj: 2}}, schedule: cosine}
"""


def read(tmp_path: Path, text: str) -> Recipe:
    (tmp_path / "recipe.yaml").write_text(text)
    return Recipe.from_file(tmp_path / "recipe.yaml")


def test_defaults_complete_each_adapter(tmp_path) -> None:
    recipe = read(tmp_path, WHOLE)
    plain, own = recipe.adapters["plain"], recipe.adapters["own"]
    assert recipe.output == tmp_path / "out"
    assert (plain.data, plain.epochs, plain.steps, plain.evaluation) == (tmp_path / "all.jsonl", 3, None, 0.1)
    assert (own.data, own.test) == (tmp_path / "own.jsonl", tmp_path / "test.jsonl")
    assert (own.epochs, own.steps, own.evaluation) == (None, 5, 0.0)  # an adapter's steps replace default epochs
    assert (own.lora.r, own.lora.lora_alpha, own.lora.rank_pattern) == (16, 16, {"v_proj": 2})
    assert plain.learning_rate == 0.001  # YAML 1.1 reads 1e-3 as text


def test_conditions_are_json_without_paths(tmp_path) -> None:
    conditions = read(tmp_path, WHOLE).conditions()
    assert json.loads(json.dumps(conditions)) == conditions
    assert str(tmp_path) not in json.dumps(conditions)
    assert conditions["adapters"]["own"]["lora"]["r"] == 16


def one(settings: str, more: str = "") -> str:
    return f"output: out\nadapters: {{a: {{data: a.jsonl, {settings}}}}}\n{more}"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("adapters: {}", "output is missing"),
        ("output: o\nadapters: {}", "adapters={}: must be a mapping of names to settings, with at least one"),
        ("output: o\nadapters: {a: {steps: 1}}", "adapters.a.data is missing"),
        ("output: o\nadapters: {a/b: {data: a, steps: 1}}", "adapters.a/b: an adapter's name must"),
        ("output: o\nadapters: {a: {data: a, steps: 1}, a: {data: a, steps: 1}}", "'a' occurs twice"),
        (one("steps: 1", "checkpoint_evry: 1"), "checkpoint_evry is unknown (did you mean 'checkpoint_every'?)"),
        (one("steps: 1", "defaults: {step: 1}"), "defaults.step is unknown (did you mean 'steps'?)"),
        (one("steps: 1", "defaults: {batch_size: 0}"), "defaults.batch_size=0: must be an integer of at least 1"),
        (one("steps: 1, learning_rat: 1"), "adapters.a.learning_rat is unknown (did you mean 'learning_rate'?)"),
        (one("steps: 1, learning_rate: 0"), "adapters.a.learning_rate=0.0: must be a number above 0"),
        (one("steps: 1, schedule: cosin"), "adapters.a.schedule='cosin': must be 'constant' or 'linear' or 'cosine'"),
        (one("steps: 1, epochs: 1"), "adapters.a.epochs: give either epochs or steps, found epochs=1, steps=1"),
        (one("batch_size: 1"), "adapters.a.epochs: give either epochs or steps, found neither"),
        (one("steps: 1, test: t, evaluation: 0.1"), "adapters.a.evaluation=0.1: cannot be combined with test"),
        (one("steps: 1, early_stopping: 2"), "adapters.a.early_stopping=2: needs evaluation examples"),
        (one("steps: 1, lora: {rank: 4}"), "adapters.a.lora.rank is unknown"),
        (one("steps: 1, lora: {lora_dropout: 0.1}"), "adapters.a.lora.lora_dropout is unknown"),
        (one("steps: 1, lora: {r: 0}"), "adapters.a.lora.r: rank must be an integer in 1..256, found 0"),
        ("- a", "must be a mapping of settings, found list"),
        ("a: [", "cannot be read as YAML"),
    ],
)
def test_errors_name_file_and_field(tmp_path, text, message) -> None:
    with pytest.raises(ConfigError) as raised:
        read(tmp_path, text)
    assert str(raised.value).startswith(f"{tmp_path / 'recipe.yaml'}: ") and message in str(raised.value)
