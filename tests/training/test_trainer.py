"""The trainer: adapters independent of each other, no compilation, losses, restoring, limits."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from peft_training import examples

from slora_jax.adapters import LoraConfig, random_adapter, read_peft, write_peft
from slora_jax.errors import AdapterError, ConfigError, RequestError, UnknownAdapterError
from slora_jax.training import Adam, Example, Trainer, TrainerConfig

ATTENTION, MLP = ("q_proj", "k_proj", "v_proj", "o_proj"), ("gate_proj", "up_proj", "down_proj")
CONFIGS = {
    "rank-1": LoraConfig(r=1, target_modules="all-linear"),
    "rank-16-attention": LoraConfig(r=16, lora_alpha=32, target_modules=ATTENTION),
    "rank-40-mlp": LoraConfig(r=40, target_modules=MLP, use_rslora=True),
    "q-only": LoraConfig(r=4, target_modules=("q_proj",)),
    "one-layer": LoraConfig(r=8, target_modules=ATTENTION, layers_to_transform=(1,)),
    "patterns": LoraConfig(r=8, target_modules="all-linear", rank_pattern={"q_proj": 3}, alpha_pattern={"v_proj": 40}),
    "down": LoraConfig(r=33, lora_alpha=1, target_modules=("down_proj",)),
    "alpha": LoraConfig(r=8, lora_alpha=64, target_modules=("k_proj", "gate_proj")),
}
OPTIMIZERS = {
    "rank-1": Adam(1e-2, weight_decay=0.1),
    "q-only": Adam(lambda step: 1e-3 / (1 + step), clip_norm=0.5),
    "down": Adam(1e-3, b1=0.8, b2=0.99, eps=1e-8),
}
STEPS = 3


def data(tiny, name: str, step: int) -> list[Example]:
    """An adapter's examples for a step: two to four sequences of different lengths."""
    rng = np.random.default_rng([list(CONFIGS).index(name), step])
    return examples(rng, tuple(rng.integers(1, 60, rng.integers(2, 5))), tiny.config.vocab_size)


def train(trainer: Trainer, tiny, names, steps=range(STEPS)) -> dict[str, list[float]]:
    """Trains these adapters in one batch per step, and returns their losses."""
    losses: dict[str, list[float]] = {name: [] for name in names}
    for step in steps:
        outcomes = trainer.forward_backward({name: data(tiny, name, step) for name in names})
        reports = trainer.optim_step(names)
        for name in names:
            assert outcomes[name].error is None and reports[name].error is None
            losses[name].append(outcomes[name].loss)
    return losses


def add(trainer: Trainer, *names: str) -> None:
    for name in names:
        trainer.add(name, CONFIGS[name], OPTIMIZERS.get(name, Adam(1e-3)), seed=3)


def assert_same(state: dict[str, np.ndarray], other: dict[str, np.ndarray]) -> None:
    """Checks two states for equal bits."""
    assert state.keys() == other.keys()
    for part, array in state.items():
        np.testing.assert_array_equal(array, other[part], err_msg=part)


def test_training_together_equals_training_alone_bit_by_bit(trainer, tiny) -> None:
    """Losses, weights and moments of eight adapters in one batch, against each by itself, at other pages and rows."""
    add(trainer, *CONFIGS)
    losses = train(trainer, tiny, list(CONFIGS))
    together = {name: trainer.state(name) for name in CONFIGS}
    for name in CONFIGS:
        trainer.remove(name)
    for name in reversed(CONFIGS):
        add(trainer, name)
        assert train(trainer, tiny, [name])[name] == losses[name]
        assert_same(trainer.state(name), together[name])
        trainer.remove(name)


@pytest.mark.parametrize("fault", ["loss is nan", "huge gradient", "bad data"])
def test_a_fault_stops_one_adapter_and_changes_no_bit_of_others(trainer, tiny, fault) -> None:
    add(trainer, "rank-16-attention", "patterns")
    expected = train(trainer, tiny, ["rank-16-attention", "patterns"])
    states = {name: trainer.state(name) for name in trainer.names()}
    for name in states:
        trainer.remove(name)
    add(trainer, "rank-16-attention", "down", "patterns")
    before = trainer.state("down")
    if fault == "loss is nan":
        trainer.restore("down", before | {"master": np.full_like(before["master"], np.nan)})
        before = trainer.state("down")
    for step in range(STEPS):
        batch = {name: data(tiny, name, step) for name in trainer.names()}
        if fault == "huge gradient":
            batch["down"] = [Example(one.tokens, one.targets, one.weights * 3e37) for one in batch["down"]]
        if fault == "bad data":
            batch["down"][1].tokens[0] = tiny.config.vocab_size
        outcomes = trainer.forward_backward(batch)
        reports = trainer.optim_step([name for name in batch if outcomes[name].error is None])
        for name, losses in expected.items():
            assert outcomes[name].loss == losses[step] and reports[name].error is None
    for name, state in states.items():
        assert_same(trainer.state(name), state)
    assert_same(trainer.state("down"), before)
    if fault == "bad data":
        assert f"example 1: tokens: id {tiny.config.vocab_size} is not in" in outcomes["down"].error
        assert trainer.stopped("down") is None
    else:
        what = "its loss is nan" if fault == "loss is nan" else "the norm of its gradient is "
        assert what in trainer.stopped("down") == outcomes["down"].error
        assert not trainer.pool.read("gradient", trainer._adapters["down"].pages).any()


def test_joining_leaving_and_other_ranks_compile_nothing(trainer, tiny, compilations) -> None:
    add(trainer, "rank-16-attention")
    train(trainer, tiny, ["rank-16-attention"])
    trainer.adapter("rank-16-attention")
    compilations.clear()
    for name in ("rank-1", "rank-40-mlp", "patterns"):
        add(trainer, name)
        train(trainer, tiny, trainer.names(), range(1))
        trainer.adapter(name)
    trainer.remove("rank-1")
    train(trainer, tiny, ["patterns", "rank-40-mlp"], range(1))
    assert compilations == []


def test_restored_state_continues_bit_by_bit(trainer, tiny) -> None:
    add(trainer, "patterns")
    train(trainer, tiny, ["patterns"], range(2))
    middle = trainer.state("patterns")
    train(trainer, tiny, ["patterns"], range(2, 4))
    end = trainer.state("patterns")
    trainer.remove("patterns")
    add(trainer, "rank-1", "patterns")
    trainer.restore("patterns", middle)
    train(trainer, tiny, ["patterns"], range(2, 4))
    assert_same(trainer.state("patterns"), end)


def test_gradients_accumulate_until_the_step(trainer, tiny) -> None:
    """One call with all examples equals a call for each: the sum has the same order."""
    batch = examples(np.random.default_rng(0), (64, 60, 62), tiny.config.vocab_size)
    for name, parts in (("rank-1", [batch]), ("q-only", [batch])):
        add(trainer, name)
        for part in parts:
            trainer.forward_backward({name: part})
        whole = trainer.gradient(name)
        trainer.optim_step([name])
        assert not any(part.any() for pair in trainer.gradient(name).values() for part in pair)
        trainer.restore(name, trainer.state(name))
        trainer.remove(name)
        add(trainer, name)
        for one in batch:
            trainer.forward_backward({name: [one]})
        for key, pair in trainer.gradient(name).items():
            np.testing.assert_array_equal(pair[0], whole[key][0])
            np.testing.assert_array_equal(pair[1], whole[key][1])


def test_named_losses_are_their_formulas(trainer, tiny) -> None:
    """Values against NumPy, gradients against `forward_backward_custom` of the same formula."""
    rng = np.random.default_rng(5)
    trainer.add("x", random_adapter(tiny.geometry, rank=4, seed=1))
    plain = examples(rng, (50, 20), tiny.config.vocab_size)
    now = trainer.forward({"x": plain})["x"].logprobs
    batch = []
    for one, logprobs in zip(plain, now, strict=True):
        inputs = {
            "logprobs": (logprobs + rng.normal(0, 0.3, logprobs.shape)).astype(np.float32),
            "advantages": rng.normal(size=logprobs.shape).astype(np.float32),
        }
        batch.append(Example(one.tokens, one.targets, one.weights, inputs))

    def formula(name, p, one):
        ratio, advantage = jnp.exp(p - one.inputs["logprobs"]), one.inputs["advantages"]
        clipped = jnp.clip(ratio, 0.8, 1.2)
        return (
            one.weights
            * {
                "cross_entropy": -p,
                "importance_sampling": -ratio * advantage,
                "ppo": -jnp.minimum(ratio * advantage, clipped * advantage),
                "cispo": -jax.lax.stop_gradient(clipped) * advantage * p,
            }[name]
        )

    for name in ("cross_entropy", "importance_sampling", "ppo", "cispo"):
        loss = trainer.forward_backward({"x": batch}, name)["x"].loss
        gradient = trainer.gradient("x")
        trainer.restore("x", trainer.state("x"))
        custom = trainer.forward_backward_custom(
            {"x": batch},
            lambda _, ps, name=name: sum(formula(name, p, one).sum() for p, one in zip(ps, batch)),  # noqa: B905
        )["x"].loss
        assert loss == pytest.approx(custom, rel=1e-5)
        for key, (a, b) in trainer.gradient("x").items():
            np.testing.assert_allclose(a, gradient[key][0], atol=2e-5 * np.abs(a).max())
            np.testing.assert_allclose(b, gradient[key][1], atol=2e-5 * np.abs(b).max())
        trainer.restore("x", trainer.state("x"))


def test_adapters_round_trip_through_peft_directories(trainer, tiny, tmp_path) -> None:
    adapter = random_adapter(tiny.geometry, rank={"q": 3, "down": 17}, seed=4)
    trainer.add("x", adapter)
    assert trainer.adapter("x").digest == adapter.digest
    again = read_peft(write_peft(tmp_path / "x", trainer.adapter("x")), tiny.geometry)
    assert again.digest == adapter.digest


def test_initial_adapters_have_the_distribution_of_peft(trainer, tiny) -> None:
    add(trainer, "rank-40-mlp")
    adapter = trainer.adapter("rank-40-mlp")
    a = np.concatenate([adapter.a[layer, "up"].ravel() for layer in range(2)])
    bound = tiny.config.hidden_size**-0.5
    assert np.abs(a).max() <= bound and a.std() == pytest.approx(bound / 3**0.5, rel=0.05)
    assert not any(b.any() for b in adapter.b.values())


def test_memory_follows_the_true_ranks(trainer) -> None:
    """An adapter takes the pages of its own ranks, whatever the largest accepted rank is."""
    pages = [trainer.pages_of(LoraConfig(r=r, target_modules="all-linear")) for r in (8, 16, 64)]
    assert pages[1] <= 2 * pages[0] and pages[2] >= 3 * pages[1]
    add(trainer, "rank-1", "rank-40-mlp")
    used = trainer.config.num_pages - 1 - trainer.pool.allocator.num_free
    assert used == trainer.pages_of(CONFIGS["rank-1"]) + trainer.pages_of(CONFIGS["rank-40-mlp"])


@pytest.mark.parametrize("fields", [{"use_dora": True}, {"bias": "all"}, {"alora_invocation_tokens": (1, 2)}])
def test_adapter_beyond_plain_lora_is_refused_by_name(trainer, fields) -> None:
    with pytest.raises(AdapterError, match=f"{next(iter(fields))} can be served but not trained"):
        trainer.add("x", LoraConfig(target_modules=("q_proj",), **fields))
    with pytest.raises(AdapterError, match="matches 'lm_head'"):
        trainer.add("x", LoraConfig(target_modules=("lm_head",)))


def test_wrong_use_is_an_error_that_names_it(trainer, tiny) -> None:
    add(trainer, "q-only")
    one = examples(np.random.default_rng(0), (8,), tiny.config.vocab_size)
    with pytest.raises(AdapterError, match="'q-only': is in training already"):
        add(trainer, "q-only")
    with pytest.raises(AdapterError, match=r"has rank 65 but max_lora_rank is 64"):
        trainer.add("x", LoraConfig(r=65, target_modules=("q_proj",)))
    with pytest.raises(AdapterError, match=r"needs \d+ pages of the training pool, \d+ of \d+ are free"):
        for number in range(12):
            trainer.add(f"x{number}", LoraConfig(r=64, target_modules="all-linear"))
    with pytest.raises(UnknownAdapterError, match="'y' is not in training"):
        trainer.forward({"y": one})
    with pytest.raises(ConfigError, match="loss='mse'"):
        trainer.forward({"q-only": one}, "mse")
    with pytest.raises(ConfigError, match=r"names\['q-only'\]=1: must be an Adam"):
        trainer.optim_step({"q-only": 1})
    with pytest.raises(ConfigError, match=r"TrainerConfig.lengths=\(64, 32\)"):
        TrainerConfig(num_pages=10, lengths=(64, 32))
    with pytest.raises(RequestError, match="weights: must be finite, found nan"):
        Example(one[0].tokens, one[0].targets, one[0].weights * np.nan).check(500, 64, ())
    for bad, message in (
        ([], "must not be empty"),
        (examples(np.random.default_rng(0), (65,), 100), "must have 1 to 64 ids"),
        ([Example(one[0].tokens, one[0].targets[1:], one[0].weights)], "targets: must be 8 integers"),
    ):
        assert message in trainer.forward({"q-only": bad})["q-only"].error
    assert "'logprobs', 'advantages'" in trainer.forward({"q-only": one}, "ppo")["q-only"].error
