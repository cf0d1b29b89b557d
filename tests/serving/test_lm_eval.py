"""lm-evaluation-harness scores an adapter through the server as through transformers and PEFT."""

from __future__ import annotations

import json
from typing import Any

import pytest
from live_server import SERVE_KEY, Files, LiveServer

QUESTIONS = [
    ("The quick brown fox", [" jumps", " sleeps", " cinq"], 0),
    ("Un œuf coûte cinq", [" dog", " €", " 猫は走る"], 1),
    ("emoji take", [" four bytes", " lazy", " six bytes"], 0),
    ("猫は窓のそばで", ["走る", "眠っている", " over the"], 1),
]
TASK = """
task: tiny_choice
dataset_path: json
dataset_kwargs: {data_files: {validation: FILE}}
output_type: multiple_choice
validation_split: validation
doc_to_text: "{{question}}"
doc_to_choice: "{{choices}}"
doc_to_target: "{{label}}"
target_delimiter: ""
metric_list: [{metric: acc}, {metric: acc_norm}]
"""


@pytest.fixture
def score(tmp_path, monkeypatch):
    """Returns a function that evaluates the task: its metrics, and the log-likelihoods of all choices."""
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("OPENAI_API_KEY", SERVE_KEY)
    import lm_eval
    from lm_eval.tasks import TaskManager

    rows = [dict(zip(("question", "choices", "label"), row, strict=True)) for row in QUESTIONS]
    (tmp_path / "task").mkdir()
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (tmp_path / "task" / "tiny.yaml").write_text(TASK.replace("FILE", str(tmp_path / "rows.jsonl")))
    manager = TaskManager(include_path=str(tmp_path / "task"), include_defaults=False)

    def run(kind: str, /, **arguments: Any) -> tuple[dict[str, float], list[float]]:
        done = lm_eval.simple_evaluate(kind, arguments, tasks=["tiny_choice"], task_manager=manager, bootstrap_iters=0)
        metrics = {name: value for name, value in done["results"]["tiny_choice"].items() if name.startswith("acc")}
        samples = sorted(done["samples"]["tiny_choice"], key=lambda sample: sample["doc_id"])
        return metrics, [float(one[0][0]) for sample in samples for one in sample["resps"]]

    return run


def test_scores_equal_those_through_transformers(server: LiveServer, files: Files, score) -> None:
    adapter = "adapter-4"
    served = score(
        "local-completions", model=adapter, base_url=f"{server.url}/v1/completions",
        tokenizer_backend="huggingface", tokenizer=str(files.model), max_length=127, num_concurrent=4,
    )  # fmt: skip
    peft = {"peft": str(files.adapters / adapter)}
    expected = score("hf", pretrained=str(files.model), dtype="float32", device="cpu", max_length=127, **peft)
    assert served[0] == expected[0] and len(served[1]) == sum(len(choices) for _, choices, _ in QUESTIONS)
    assert served[1] == pytest.approx(expected[1], abs=1e-3)
