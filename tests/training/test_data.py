"""Training examples from JSONL files: which tokens are trained, and errors that name file, line and field."""

import json
from pathlib import Path

import numpy as np
import pytest
from byte_level import train_tokenizer

from slora_jax.engine.tokenizer import Tokenizer
from slora_jax.errors import ConfigError
from slora_jax.training.data import Encoder, load_datasets
from slora_jax.training.recipe import Recipe

CHATML = (
    "{% for message in messages %}[{{ message.role }}]\n{{ message.content }}</s>\n{% endfor %}"
    "{% if add_generation_prompt %}[assistant]\n{% endif %}"
)
DIALOGUE = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "The fox?"},
    {"role": "assistant", "content": "It jumps. 猫"},
    {"role": "user", "content": "And?"},
    {"role": "assistant", "content": "\nThe dog is lazy."},
]


@pytest.fixture(scope="module")
def backend():
    return train_tokenizer()


def encoder(backend, template: str = CHATML, **settings) -> Encoder:
    tokenizer = Tokenizer(backend, chat_template=template, special_tokens={"bos_token": "<s>", "eos_token": "</s>"})
    return Encoder(tokenizer, tokenizer.eos_token_id, **{"max_length": 1000} | settings)


def trained_text(encoder: Encoder, sample) -> str:
    """The trained tokens as text, with a bar between parts that do not touch."""
    parts = np.split(sample.ids, np.flatnonzero(np.diff(sample.trained)) + 1)
    return "|".join(encoder.tokenizer.decode(part) for part in parts[1 - sample.trained[0] :: 2])


def test_every_assistant_turn_is_trained_with_its_end(backend) -> None:
    sample = (chat := encoder(backend)).conversation(DIALOGUE)
    assert trained_text(chat, sample) == "It jumps. 猫</s>|\nThe dog is lazy.</s>"
    whole = chat.tokenizer.apply_chat_template(DIALOGUE)
    assert chat.tokenizer.decode(sample.ids) == whole.removesuffix("\n")  # the last newline trains nothing


def test_a_prompt_has_the_tokens_of_a_served_one(backend) -> None:
    template = CHATML.replace("]\n", "]: ").replace("</s>\n", "\n")  # the space would join the answer's first word
    chat = encoder(backend, template)
    sample = chat.conversation(DIALOGUE[1:3])
    served = chat.tokenizer(chat.tokenizer.apply_chat_template(DIALOGUE[1:2], add_generation_prompt=True))["input_ids"]
    assert sample.ids[: len(served)].tolist() == served and not sample.trained[: len(served)].any()
    assert trained_text(chat, sample) == "It jumps. 猫\n"


def test_a_completion_is_trained_with_the_end_of_sequence(backend) -> None:
    plain = encoder(backend)
    sample = plain.completion("The quick", " brown fox")
    assert trained_text(plain, sample) == " brown fox</s>"
    assert plain.completion("", "fox").trained[0] == 0  # nothing precedes the first token


def test_templates_that_hide_the_trained_tokens_are_refused_by_name(backend) -> None:
    shortened = "message.content if loop.last or message.role != 'assistant' else '...'"
    with pytest.raises(ConfigError, match=r"messages\[2\]: .* renders this turn differently when others follow"):
        encoder(backend, CHATML.replace("message.content", shortened)).conversation(DIALOGUE)
    other_prompt = CHATML.replace("%}[assistant]\n", "%}[answer]\n")
    with pytest.raises(ConfigError, match=r"messages\[2\]: .* renders the prompt of this turn differently"):
        encoder(backend, other_prompt).conversation(DIALOGUE)


def write(path: Path, lines: list) -> Path:
    path.write_text("\n".join(line if isinstance(line, str) else json.dumps(line) for line in lines))
    return path


def test_all_bad_lines_are_reported_with_their_fields(backend, tmp_path) -> None:
    good = {"prompt": "a", "completion": "b"}
    file = write(
        tmp_path / "a.jsonl",
        [
            good,
            "{",
            {"prompt": "a"},
            {"prompt": "a", "completion": "b", "extra": 1},
            "",
            {"messages": [{"role": "user", "content": 1}]},
            {"messages": [{"role": "user", "content": "x"}]},
            {"prompt": "a", "completion": "\ud800"},
        ],
    )
    with pytest.raises(ConfigError) as raised:
        encoder(backend).read(file)
    message = str(raised.value)
    assert message.startswith(f"{file}: 6 of 8 lines are bad: line 2: not valid JSON")
    assert "line 3: completion is missing" in message and "line 4: extra is unknown" in message
    assert "line 6: messages[0].content=1: must be text" in message
    assert "line 7: messages: has no message with role 'assistant'" in message and message.endswith("; ...")


def test_long_examples_are_skipped_or_cut_and_counted(backend, tmp_path, caplog) -> None:
    rows = [("a", "b"), ("a", "fox " * 20), ("fox " * 20, "b")]
    file = write(tmp_path / "a.jsonl", [{"prompt": prompt, "completion": text} for prompt, text in rows])
    kept, warnings = encoder(backend, max_length=10).read(file)
    assert len(kept) == 1 and warnings == (f"{file}: 2 of 3 examples are skipped: they exceed max_length=10",)
    kept, warnings = encoder(backend, max_length=10, cut=True).read(file)
    assert [len(sample.ids) for sample in kept] == [3, 10]
    assert warnings == (
        f"{file}: 2 of 3 examples are cut to max_length=10",
        f"{file}: 1 of 3 examples are skipped: with max_length=10 they have no token to train",
    )


def datasets(backend, tmp_path, settings: dict):
    write(tmp_path / "a.jsonl", [{"prompt": "", "completion": f"{number}"} for number in range(10)])
    recipe = Recipe.from_mapping({"output": "o", "adapters": {"a": {"data": "a.jsonl"} | settings}}, tmp_path)
    return recipe.adapters["a"], load_datasets(recipe, encoder(backend))["a"]


def test_batches_are_a_function_of_seed_and_step(backend, tmp_path) -> None:
    adapter, data = datasets(backend, tmp_path, {"epochs": 2, "batch_size": 4, "seed": 3})
    steps = [[sample.ids.tobytes() for sample in data.batch(adapter, step)] for step in range(data.steps(adapter))]
    assert [len(batch) for batch in steps] == [4, 4, 2] * 2
    first, second = ([one for batch in epoch for one in batch] for epoch in (steps[:3], steps[3:]))
    assert len(set(first)) == 10 and sorted(first) == sorted(second) and first != second
    _, again = datasets(backend, tmp_path, {"epochs": 2, "batch_size": 4, "seed": 3})
    assert [sample.ids.tobytes() for sample in again.batch(adapter, 4)] == steps[4]


def test_the_held_out_share_is_not_trained(backend, tmp_path) -> None:
    _, data = datasets(backend, tmp_path, {"epochs": 1, "evaluation": 0.2})
    parts = [{sample.ids.tobytes() for sample in part} for part in (data.train, data.evaluation)]
    assert [len(part) for part in parts] == [8, 2] and not parts[0] & parts[1]
    (tmp_path / "empty.jsonl").write_text("")
    with pytest.raises(ConfigError, match=r"adapters.a: .*empty.jsonl leaves no example to evaluate on"):
        datasets(backend, tmp_path, {"epochs": 1, "test": "empty.jsonl"})
