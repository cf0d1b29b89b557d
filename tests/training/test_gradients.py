"""Losses, log-probabilities and gradients against PEFT and torch's autograd."""

from dataclasses import replace

import numpy as np
import pytest
from peft_families import ADAPTERS, PeftFamily
from peft_training import examples, torch_gradients
from small_families import FAMILIES, SmallFamily

from slora_jax.errors import AdapterError
from slora_jax.training import Trainer, TrainerConfig

CONFIG = TrainerConfig(num_pages=400, max_adapters=8, lengths=(128,), tokens=(256,), dtype="float32")
UNFUSED = {"phi3": ["o_proj", "down_proj"], "glm4": ["q_proj", "k_proj", "v_proj", "o_proj", "down_proj"]}
"""Targets in the families with fused modules, which are not trained."""


@pytest.mark.parametrize("name", ["llama-gqa-tied-biased-llama3-rope", "qwen3"])
def test_gradients_of_all_adapters_in_one_batch_match_torch(name, tmp_path) -> None:
    """Biases and a tied head, or normed queries; mixed ranks, rsLoRA, patterns, all targets: relative error 1e-4."""
    family = PeftFamily(name, tmp_path)
    trainer = Trainer.from_pretrained(family.model_dir, CONFIG)
    rng = np.random.default_rng(0)
    batches = {}
    for index, adapter in enumerate(ADAPTERS):
        trainer.add(adapter, family.adapter_dir / adapter)
        batches[adapter] = examples(rng, (20, 45, 90) if index % 2 else (30, 25, 50, 9))
    outcomes = trainer.forward_backward(batches)
    for adapter, batch in batches.items():
        check(trainer, outcomes[adapter], family, adapter, batch)


@pytest.mark.parametrize("name", FAMILIES)
def test_gradients_of_one_adapter_match_torch(name, tmp_path) -> None:
    family = SmallFamily(name, tmp_path, UNFUSED.get(name))
    trainer = Trainer.from_pretrained(family.model_dir, replace(CONFIG, lengths=(64,), tokens=(64,)))
    trainer.add("tuned", family.adapter_dir)
    batch = examples(np.random.default_rng(0), (40, 24))
    outcome = trainer.forward_backward({"tuned": batch})["tuned"]
    check(trainer, outcome, family, "tuned", batch)


def check(trainer, outcome, family, adapter, batch) -> None:
    """Compares the loss and every gradient."""
    loss, expected = torch_gradients(family, adapter, batch)
    assert outcome.error is None
    assert outcome.loss == pytest.approx(loss, rel=1e-5)
    found = trainer.gradient(adapter)
    assert {(layer, projection) for layer, projection, _ in expected} == found.keys()
    for (layer, projection, side), gradient in expected.items():
        error = np.abs(found[layer, projection]["AB".index(side)] - gradient).max() / np.abs(gradient).max()
        assert error < 1e-4, f"{adapter}, layer {layer}, {projection}, {side}: {error:.1e}"


@pytest.mark.parametrize(
    ("targets", "message"),
    [
        (["qkv_proj", "o_proj"], "'qkv_proj' is a fused module; .* Train q_proj, k_proj, v_proj"),
        (".*(qkv|o)_proj", "'tuned': has LoRA on fused modules; it can be served but not trained"),
    ],
)
def test_adapters_of_fused_modules_are_not_trained_in_part(targets, message, tmp_path) -> None:
    family = SmallFamily("phi3", tmp_path, targets)
    trainer = Trainer.from_pretrained(family.model_dir, replace(CONFIG, lengths=(64,), tokens=(64,)))
    with pytest.raises(AdapterError, match=message):
        trainer.add("tuned", family.adapter_dir)
