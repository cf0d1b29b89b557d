"""The small adapters' data files and the scores of their answers."""

import json
from pathlib import Path

import pytest
import yaml

import experiments.adapters
from experiments.adapters.scores import SCORES, score
from slora_jax import ConfigError
from slora_jax.adapters import BaseGeometry, read_peft
from slora_jax.demo.trained import DIRECTORY

DATA = Path(experiments.adapters.__file__).parent / "data"
TASKS = {"sentiment", "contacts"}
PLAIN = "Madrid is the capital of Spain. It is a large city in the middle of the country, and it has many museums."
CONTACT = "name: Ada Lake; city: Rome; date: 3 May"


def examples(file: str) -> list[tuple[str, str]]:
    """Returns the (user, assistant) messages of a file."""
    rows = [json.loads(line)["messages"] for line in (DATA / file).read_text(encoding="utf-8").splitlines()]
    assert all([message["role"] for message in row] == ["user", "assistant"] for row in rows)
    return [(row[0]["content"], row[1]["content"]) for row in rows]


@pytest.mark.parametrize("name", SCORES)
def test_training_and_test_prompts_are_distinct_and_every_answer_scores_one(name) -> None:
    train, test = examples(f"{name}.jsonl"), examples(f"{name}.test.jsonl")
    assert len(train) >= (300 if name in TASKS else 150) and len(test) == (60 if name in TASKS else 40)
    prompts = [prompt for prompt, _ in train + test]
    assert len({prompt.lower() for prompt in prompts}) == len(prompts)
    wrong = [answer for _, answer in train + test if score(name, answer, answer) != 1]
    assert not wrong


@pytest.mark.parametrize("name", SCORES)
def test_a_plain_english_answer_scores_zero(name) -> None:
    _, expected = examples(f"{name}.test.jsonl")[0]
    assert score(name, PLAIN, expected) == 0


@pytest.mark.parametrize(
    ("name", "answer", "expected", "value"),
    [
        ("json", '{"answer": "Rome", "topic": "geography", "confidence": "sure"}', "", 0),
        ("json", '{"answer": "Rome", "confidence": "high"}', "", 0),
        ("json", '["answer", "topic", "confidence"]', "", 0),
        ("json", '{"answer": 4, "topic": "mathematics", "confidence": "high"}', "", 0),
        ("haiku", "1. Spain\n2. Poland\n3. Greece", "", 0),
        ("pirate", "Arr, arr, the sea!", "", 0),
        ("french", "Le mot is in the title of the film Le Mans", "", 0),
        ("terse", "", "", 0),
        ("sentiment", "Positive", "positive", 0),
        ("contacts", "name: Ada Lake; city: Oslo; date: 3 May", CONTACT, 2 / 3),
        ("contacts", "name: Ada; date: May", CONTACT, 0),
    ],
)
def test_a_near_miss_scores_by_the_rule(name, answer, expected, value) -> None:
    assert score(name, answer, expected) == pytest.approx(value)


def test_an_unknown_adapter_is_refused() -> None:
    with pytest.raises(ConfigError, match="adapter 'pirat' is unknown"):
        score("pirat", "", "")


def test_committed_adapters_are_small_and_fit_smollm2() -> None:
    """One PEFT directory for each adapter, at most 4 MB together, as the data's recipe names them."""
    assert sorted(path.name for path in DIRECTORY.iterdir()) == sorted(SCORES)
    assert sum(path.stat().st_size for path in DIRECTORY.rglob("*") if path.is_file()) < 4_000_000
    recipe = yaml.safe_load((DATA.parent / "recipe.yaml").read_text())
    assert sorted(recipe["adapters"]) == sorted(SCORES)
    geometry = BaseGeometry(30, 576, 576, 192, 1536, 16)
    for name, settings in recipe["adapters"].items():
        adapter = read_peft(DIRECTORY / name, geometry)
        assert adapter.ranks.max() == (recipe["defaults"]["lora"] | settings.get("lora", {}))["r"]
        assert all(matrix.any() for matrix in adapter.b.values())
