"""Publishing into an engine that serves."""

import numpy as np
import pytest
from peft_training import examples

from slora_jax import SamplingParams
from slora_jax.adapters import random_adapter
from slora_jax.errors import AdapterError, ConfigError
from slora_jax.training import Adam, Example, Trainer, TrainerConfig

GREEDY = SamplingParams(max_tokens=8, ignore_eos=True)


@pytest.fixture
def served(engine, trainer, tiny):
    """An adapter in training, and the engine; afterwards the engine has no adapter."""
    trainer.add("x", random_adapter(tiny.geometry, rank=5, seed=1), Adam(3e-2))
    yield engine
    for info in engine.adapters():
        engine.unload_adapter(info.name)


def step(trainer: Trainer, tiny, seed: int) -> None:
    trainer.forward_backward({"x": examples(np.random.default_rng(seed), (40, 20), tiny.config.vocab_size)})
    assert trainer.optim_step(["x"])["x"].error is None


def test_published_weights_serve_new_requests_only(trainer, served, tiny, compilations) -> None:
    """A request under way keeps the old content, a new one with the same prompt gets the new, prefix cache or not."""
    engine, prompt = served, list(range(5, 37))
    trainer.publish(engine, "x", "served")
    old = engine.generate(prompt, GREEDY, "served")[0].token_ids
    step(trainer, tiny, 0)
    new_adapter = trainer.adapter("x")
    compilations.clear()
    running = engine.add_request(prompt, GREEDY, "served")
    engine.step()
    engine.step()
    info = trainer.publish(engine, "x", "served")
    added = engine.add_request(prompt, GREEDY, "served")
    outputs = {}
    while engine.has_work():
        outputs |= {delta.request_id: delta.output for delta in engine.step() if delta.output is not None}
    assert compilations == []
    assert info.digest == new_adapter.digest
    engine.load_adapter("check", new_adapter)
    expected = engine.generate(prompt, GREEDY, "check")[0].token_ids
    assert outputs[running].token_ids == old != expected
    assert outputs[added].token_ids == expected


def test_served_logprobs_match_the_trainers_within_twice_the_base_models_noise(trainer, served, tiny) -> None:
    """The noise floor is the difference between engine and trainer for an adapter without effect."""
    engine = served
    params = SamplingParams(max_tokens=30, temperature=1.0, logprobs=1, seed=3, ignore_eos=True)
    trainer.add("none", random_adapter(tiny.geometry, rank=1, scale_of_b=0.0))
    for seed in range(3):
        step(trainer, tiny, seed)
    differences = {}
    for name in ("none", "x"):
        trainer.publish(engine, name)
        output = engine.generate([7, 8, 9], params, name)[0]
        ids = np.array([7, 8, 9, *output.token_ids], np.int32)
        found = trainer.forward({name: [Example(ids[:-1], ids[1:], np.ones(len(ids) - 1, np.float32))]})[name]
        differences[name] = np.abs(found.logprobs[0][2:] - [one.logprob for one in output.logprobs]).max()
    assert differences["x"] <= 2 * max(differences["none"], 1e-6)


def test_weights_that_are_not_finite_are_not_published(trainer, served) -> None:
    trainer.publish(served, "x")
    digest = served.store.resolve("x")
    state = trainer.state("x")
    trainer.restore("x", state | {"master": np.full_like(state["master"], np.inf)})
    with pytest.raises(AdapterError, match="not finite"):
        trainer.publish(served, "x")
    assert served.store.resolve("x") == digest


def test_sharded_or_merged_weights_are_refused(engine, monkeypatch) -> None:
    for field, value in (("tensor_parallel_size", 2), ("lora", "merge")):
        monkeypatch.setattr(
            engine, "config", type("Changed", (), {"tensor_parallel_size": 1, "lora": "paged", field: value})
        )
        with pytest.raises(ConfigError, match=f"EngineConfig.{field}={value!r}"):
            Trainer.of_engine(engine, TrainerConfig(num_pages=10))
