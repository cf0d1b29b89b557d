"""The public `tinker` client, unmodified, trains adapters on a server and samples from them."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from live_server import Files, LiveServer
from tiny_model import TinyModel

from slora_jax.adapters import read_peft

tinker = pytest.importorskip("tinker")
torch = pytest.importorskip("torch")

TEXT = [5, 17, 9, 42, 8, 31, 77, 3, 64, 12]
ADAM = tinker.AdamParams(learning_rate=0.02)
KEYS = {"first": "tml-first", "second": "tml-second", "reader": "tml-reader"}


@pytest.fixture(scope="module")
def states(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("states")


@pytest.fixture(scope="module")
def trainer_server(files: Files, states: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[LiveServer]:
    config = {
        "api_keys": [
            *({"name": name, "key": KEYS[name], "rights": ["serve", "train"]} for name in ("first", "second")),
            {"name": "reader", "key": KEYS["reader"]},
        ],
        "train": {"max_adapters": 4, "max_lora_rank": 8, "lengths": [32], "tokens": [64], "snapshots": 2},
    }
    file = tmp_path_factory.mktemp("trainer") / "server.yaml"
    with LiveServer(files.model, file, config, arguments=("--train-dir", str(states))) as server:
        yield server
        assert server.process.poll() is None, server.log


@pytest.fixture
def connect(trainer_server: LiveServer, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable]:
    """Connects clients by the names of their keys."""
    monkeypatch.setenv("TINKER_TELEMETRY", "0")
    clients = []

    def connect(name: str = "first"):
        clients.append(tinker.ServiceClient(base_url=trainer_server.url, api_key=KEYS[name]))
        return clients[-1]

    yield connect
    for client in clients:
        client.close("success").result(timeout=60)


def create(client, rank: int = 4, seed: int = 1, **options):
    return client.create_lora_training_client("base", rank=rank, seed=seed, train_unembed=False, **options)


def datum(tokens: list[int] = TEXT, **inputs):
    targets = tokens[1:]
    inputs = inputs or {"weights": [1.0] * len(targets)}
    return tinker.Datum(tinker.ModelInput.from_ints(tokens[:-1]), {"target_tokens": targets, **inputs})


def step(model, data: list) -> float:
    passed, stepped = model.forward_backward(data, "cross_entropy"), model.optim_step(ADAM)
    stepped.result(timeout=60)
    return passed.result(timeout=60).metrics["loss:sum"]


def sample(sampler, length: int = len(TEXT) - 1, **options):
    params = tinker.SamplingParams(max_tokens=length, temperature=0.0, stop=[])
    return sampler.sample(tinker.ModelInput.from_ints(TEXT[:1]), 1, params, **options).result(timeout=60)


def test_session_trains_saves_and_samples(connect) -> None:
    client = connect()
    [supported] = client.get_server_capabilities().supported_models
    assert (supported.model_name, supported.max_context_length) == ("base", 128)
    model = create(client, rank=4)
    info = model.get_info()
    assert (info.model_data.model_name, info.lora_rank, info.is_lora) == ("base", 4, True)
    assert model.get_tokenizer().encode("hello")

    before = model.save_weights_and_get_sampling_client()
    untrained = sample(before).sequences[0].tokens
    losses = [step(model, [datum()] * 2) for _ in range(60)]
    assert losses[-1] < 0.05 < 5 < losses[0]

    path = model.save_weights_for_sampler("trained").result(timeout=60).path
    answer = sample(client.create_sampling_client(model_path=path), include_prompt_logprobs=True)
    [sequence] = answer.sequences
    assert sequence.tokens == TEXT[1:] and sequence.stop_reason == "length"
    assert answer.prompt_logprobs == [None]
    trained = model.forward([datum()], "cross_entropy").result(timeout=60).loss_fn_outputs[0]["logprobs"].to_numpy()
    np.testing.assert_allclose(sequence.logprobs, trained, atol=1e-4)
    assert sample(before).sequences[0].tokens == untrained, "an older sampler keeps its weights"


if __name__ == "__main__":
    pytest.main([__file__])
