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
ADAM = tinker.AdamParams(learning_rate=0.01)
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


@pytest.fixture
def model(connect):
    return create(connect())


def create(client, rank: int = 4, seed: int = 1, **options):
    made = client.create_lora_training_client("base", rank=rank, seed=seed, train_unembed=False, **options)
    return made.result(timeout=60)


def snapshot(model):
    return model.save_weights_and_get_sampling_client().result(timeout=60)


def datum(tokens: list[int] = TEXT, **inputs):
    targets = tokens[1:]
    inputs = inputs or {"weights": [1.0] * len(targets)}
    return tinker.Datum(tinker.ModelInput.from_ints(tokens[:-1]), {"target_tokens": targets, **inputs})


def step(model, data: list | None = None) -> float:
    passed = model.forward_backward(data or [datum()], "cross_entropy")
    stepped = model.optim_step(ADAM)
    stepped.result(timeout=60)
    return passed.result(timeout=60).metrics["loss:sum"]


def logprobs(model, data: list) -> list[np.ndarray]:
    outputs = model.forward(data, "cross_entropy").result(timeout=60).loss_fn_outputs
    return [one["logprobs"].to_numpy() for one in outputs]


def sample(sampler, **options):
    params = tinker.SamplingParams(max_tokens=len(TEXT) - 1, temperature=0.0, stop=[])
    return sampler.sample(tinker.ModelInput.from_ints(TEXT[:1]), 1, params, **options).result(timeout=60)


def test_session_trains_saves_and_samples(connect, files: Files) -> None:
    client = connect()
    model = create(client)
    info = model.get_info()
    assert (info.model_data.model_name, info.lora_rank, info.is_lora) == ("base", 4, True)
    assert info.model_data.tokenizer_id == str(files.model), "where the client's get_tokenizer looks"

    before = snapshot(model)
    untrained = sample(before).sequences[0].tokens
    losses = [step(model) for _ in range(30)]
    assert losses[-1] < 1 < 20 < losses[0]

    path = model.save_weights_for_sampler("trained").result(timeout=60).path
    [sequence] = sample(client.create_sampling_client(model_path=path).result(timeout=60)).sequences
    assert sequence.tokens == TEXT[1:] and sequence.stop_reason == "length"
    np.testing.assert_allclose(sequence.logprobs, logprobs(model, [datum()])[0], atol=1e-4)
    assert sample(before).sequences[0].tokens == untrained, "an older sampler keeps its weights"
    with pytest.raises(tinker.RequestFailedError, match="saved sampler weights never change"):
        model.save_weights_for_sampler("trained").result(timeout=60)

    latest = [snapshot(model) for _ in range(2)][-1]
    assert sample(latest).sequences[0].tokens == TEXT[1:]
    with pytest.raises(tinker.NotFoundError, match="a model's last 2 are kept"):
        sample(before)


def test_samples_have_the_log_probabilities_that_were_asked_for(connect) -> None:
    sampler = connect("reader").create_sampling_client(base_model="base").result(timeout=60)
    params = tinker.SamplingParams(max_tokens=3, temperature=1.0, seed=5, top_k=50)
    answer = sampler.sample(
        tinker.ModelInput.from_ints(TEXT),
        2,
        params,
        include_prompt_logprobs=True,
        topk_prompt_logprobs=2,
        topk_sample_logprobs=3,
        prompt_logprobs_last_n=4,
    ).result(timeout=60)
    assert [len(one) for one in (answer.sequences, answer.prompt_logprobs)] == [2, len(TEXT)]
    assert [one is None for one in answer.prompt_logprobs] == [True] * 6 + [False] * 4
    assert [one and len(one) for one in answer.topk_prompt_logprobs] == [None] * 6 + [2] * 4
    for sequence in answer.sequences:
        for token, logprob, top in zip(sequence.tokens, sequence.logprobs, sequence.topk_logprobs, strict=True):
            assert dict(top).get(token, logprob) == logprob and len(top) == 3
    everything = sampler.compute_logprobs(tinker.ModelInput.from_ints(TEXT)).result(timeout=60)
    np.testing.assert_allclose(everything[-4:], answer.prompt_logprobs[-4:], atol=1e-5)
    with pytest.raises(tinker.BadRequestError, match="prompt_alt_tokens_k: slora-jax does not support this"):
        sample(sampler, prompt_alt_tokens_k=2)


def test_two_clients_at_once_train_as_each_alone(connect) -> None:
    random = np.random.default_rng(0)
    data = [[datum([*map(int, random.integers(2, 200, 8 + i))]) for i in range(size)] for size in (3, 7)]
    models = {"first": (4, data[0]), "second": (8, data[1])}  # the second one's examples need several micro-steps

    def train(name: str) -> list[float]:
        rank, examples = models[name]
        model = create(connect(name), rank=rank, train_attn=name == "second")
        return [step(model, examples) for _ in range(5)]

    alone = {name: train(name) for name in models}
    together: dict[str, list[float]] = {}
    threads = [threading.Thread(target=lambda name=name: together.update({name: train(name)})) for name in models]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=120)
    assert together == alone
    assert all(losses[-1] < losses[0] for losses in alone.values())


def test_wrong_token_is_reported_to_its_client_only(connect) -> None:
    wrong, right = create(connect("first")), create(connect("second"))
    first = step(right)
    failed = wrong.forward_backward([datum(), datum([5, 100_000, 9])], "cross_entropy")
    assert step(right) < first
    with pytest.raises(tinker.RequestFailedError, match=r"data\[1\]\.tokens: id 100000 is not in 0\.\.") as error:
        failed.result(timeout=60)
    assert error.value.category == tinker.types.RequestErrorCategory.User
    assert wrong.optim_step(ADAM).result(timeout=60).metrics["grad_norm"] == 0, "the right example was not trained"


@pytest.mark.parametrize(
    ("loss", "settings", "inputs", "words"),
    [
        ("dro", None, {}, "loss_fn='dro': must be one of cross_entropy, importance_sampling, ppo, cispo"),
        ("cross_entropy", {"beta": 0.1}, {}, "loss_fn_config.beta: the loss cross_entropy takes no settings"),
        ("cross_entropy", None, {"advantages": [1.0] * 9}, "advantages: the loss cross_entropy takes"),
        ("ppo", None, {"logprobs": [0.0] * 9}, "the loss needs 'advantages'"),
        ("cross_entropy", None, {"weights": [1.0] * 8}, "weights: must be 9 numbers"),
        ("cross_entropy", None, {"weights": np.ones((9, 2), np.float32)}, "weights: must have one dimension"),
    ],
)
def test_examples_that_cannot_be_trained_on_are_refused(model, loss, settings, inputs, words) -> None:
    with pytest.raises(tinker.RequestFailedError, match=words):
        model.forward_backward([datum(**inputs)], loss, settings).result(timeout=60)


def test_losses_of_policies_and_of_the_client_itself(model) -> None:
    def norm(loss: str, settings: dict | None = None, **inputs) -> float:
        model.forward_backward([datum(**inputs)], loss, settings)
        return model.optim_step(tinker.AdamParams(learning_rate=0.0)).result(timeout=60).metrics["grad_norm"]

    advantages = [*np.linspace(0.5, 1.5, 9)]
    policy = {"advantages": advantages, "logprobs": logprobs(model, [datum()])[0]}
    expected = norm("cross_entropy", weights=advantages)
    for loss in ("importance_sampling", "ppo", "cispo"):
        assert norm(loss, **policy) == pytest.approx(expected, rel=1e-4)
    assert norm("ppo", {"clip_high_threshold": 0.9}, **policy) == 0, "every ratio of 1 is clipped"

    def negative_mean(data, values):
        return -sum((value * torch.tensor(advantages)).sum() for value in values), {}

    model.forward_backward_custom([datum()], negative_mean)
    stepped = model.optim_step(tinker.AdamParams(learning_rate=0.0)).result(timeout=60)
    assert stepped.metrics["grad_norm"] == pytest.approx(expected, rel=1e-4)


def test_saved_states_continue_bit_by_bit(connect, states: Path, tiny: TinyModel) -> None:
    client = connect()
    model = create(client, rank=3, train_mlp=False)
    for _ in range(2):
        step(model)
    path = model.save_state("middle").result(timeout=60).path
    expected = [step(model) for _ in range(3)]

    saved = read_peft(states / model.model_id / "weights" / "middle", tiny.geometry)
    assert (saved.config.r, saved.config.lora_alpha) == (3, 32)
    assert saved.config.target_modules == ("q_proj", "k_proj", "v_proj", "o_proj")
    again = client.create_training_client_from_state_with_optimizer(path).result(timeout=60)
    assert again.get_info().lora_rank == 3
    assert [step(again) for _ in range(3)] == expected
    again.load_state(path).result(timeout=60)
    losses = [step(again) for _ in range(3)]
    assert losses[0] == expected[0] and losses != expected, "without the optimizer's moments"
    with pytest.raises(tinker.BadRequestError, match="path='middle' exists"):
        model.save_state("middle").result(timeout=60)
    for wrong, words in (("tinker://x/weights/y", "no such state"), ("tinker://../weights/y", "must be 1 to 200")):
        with pytest.raises(tinker.APIStatusError, match=words):
            client.create_training_client_from_state(wrong).result(timeout=60)


def test_models_that_cannot_be_created_are_refused(connect) -> None:
    client = connect()
    with pytest.raises(tinker.BadRequestError, match="pass train_unembed=False"):
        client.create_lora_training_client("base").result(timeout=60)
    with pytest.raises(tinker.NotFoundError, match="this server's base model is 'base'"):
        client.create_lora_training_client("other", train_unembed=False).result(timeout=60)
    with pytest.raises(tinker.RequestFailedError, match="rank 9 but max_lora_rank is 8"):
        create(client, rank=9)


def test_end_of_a_session_frees_its_models(connect) -> None:
    client, other = connect(), connect()
    for _ in range(4):
        create(client)
    with pytest.raises(tinker.RequestFailedError, match="max_adapters=4 are in training"):
        create(other)
    client.close("success").result(timeout=60)
    create(other)


def test_rights_of_keys(connect, trainer_server: LiveServer) -> None:
    with pytest.raises(tinker.PermissionDeniedError, match="has no right to train"):
        create(connect("reader"))
    with pytest.raises(tinker.AuthenticationError, match="the API key is not known"):
        tinker.ServiceClient(base_url=trainer_server.url, api_key="tml-unknown").create_sampling_client(
            base_model="base"
        ).result(timeout=60)
    body = {"model_id": create(connect("first")).model_id}
    assert [trainer_server.post("/api/v1/get_info", body, KEYS[name])[0] for name in ("first", "second")] == [200, 404]
