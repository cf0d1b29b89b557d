"""The demo in miniature, and the check at its end: does it accept what is right and refuse what is not?"""

import json
import re
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from slora_jax.adapters import random_adapter, write_peft
from slora_jax.cli import main
from slora_jax.demo import run
from slora_jax.demo.adapters import DemoAdapter
from slora_jax.demo.checkpoint import write_checkpoint
from slora_jax.demo.traffic import make_traffic
from slora_jax.demo.verify import Weights, dense_logits, first_difference, load_weights, merge
from slora_jax.engine import adapter_geometry
from slora_jax.models import ModelConfig

ADAPTERS, REQUESTS = 12, 24
MINIATURE = ["--adapters", f"{ADAPTERS}", "--requests", f"{REQUESTS}", "--layers", "1", "--pages", "100"]


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


def test_the_demo_serves_every_adapter_and_its_check_agrees(tmp_path, capsys):
    assert main(["demo", "--dir", str(tmp_path / "demo"), *MINIATURE]) == 0
    out = capsys.readouterr().out
    assert re.search(rf"requests +{REQUESTS}, 2 of them without", out)
    assert re.search(rf"distinct adapters +{ADAPTERS}\n", out)
    assert int(re.search(r"adapter loads +(\d+)", out)[1]) >= ADAPTERS
    assert int(re.search(r"adapter evictions +(\d+)", out)[1]) > 0
    assert out.count("tokens agree\n") == ADAPTERS + 1
    assert "All 13 agree with the merged weights token for token." in out
    assert "would have answered 12 of the 12" in out


def test_the_demo_fails_when_an_adapter_is_not_what_the_engine_served(tmp_path, capsys, monkeypatch):
    def serve_then_tamper(engine, requests):
        served = run_serve(engine, requests)
        file = tmp_path / "demo" / "adapters" / "adapter-0005" / "adapter_model.safetensors"
        tensors = load_file(file)
        name = next(name for name in tensors if "layers.0.self_attn.v_proj.lora_B" in name)
        save_file(tensors | {name: -tensors[name]}, file)
        return served

    run_serve = run.serve
    monkeypatch.setattr(run, "serve", serve_then_tamper)
    assert main(["demo", "--dir", str(tmp_path / "demo"), *MINIATURE]) == 1
    out = capsys.readouterr().out
    assert re.search(r"adapter-0005.*DIFFERS: token \d+ is \d+, not \d+", out)
    assert out.count("tokens agree\n") == ADAPTERS
    assert "1 of 13 answers DIFFER" in out


def test_the_demo_touches_no_directory_of_others(tmp_path, capsys):
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "thesis.txt").write_text("do not delete")
    assert main(["demo", "--dir", str(tmp_path)]) == 2
    assert "no earlier demo left there" in capsys.readouterr().err
    assert (tmp_path / "model" / "thesis.txt").exists()


def test_traffic_asks_for_every_adapter_before_it_asks_for_one_again():
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
