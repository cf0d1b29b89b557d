"""Fifty steps beside PEFT and torch's AdamW on the same batches."""

import numpy as np
import optax
import torch
from peft_families import PeftFamily
from peft_training import examples, lora_parameters, torch_loss

from slora_jax.training import Adam, Example, Trainer, TrainerConfig

STEPS = 50
CONFIG = TrainerConfig(num_pages=400, max_adapters=8, lengths=(128,), tokens=(256,), dtype="float32")
ADAMS = {
    "all-linear": Adam(optax.cosine_decay_schedule(3e-3, STEPS), 0.9, 0.999, 1e-8, weight_decay=0.1, clip_norm=1.0),
    "mlp-only-rank-40-rslora": Adam(1e-3, 0.9, 0.95, 1e-8),
    "patterns": Adam(2e-3, 0.8, 0.99, 1e-6, weight_decay=0.01),
}


def per_token(batch: list[Example]) -> list[Example]:
    """The examples with weights divided by their sum, so that the loss is a mean."""
    total = sum(one.weights.sum() for one in batch)
    return [Example(one.tokens, one.targets, (one.weights / total).astype(np.float32)) for one in batch]


def test_loss_curves_of_three_adapters_follow_peft(tmp_path, compilations) -> None:
    """Schedule, decay, clipping and betas of each adapter's own: losses within 1e-3 over 50 steps. Only the first step
    compiles."""
    family = PeftFamily("llama-gqa-tied-biased-llama3-rope", tmp_path)
    trainer = Trainer.from_pretrained(family.model_dir, CONFIG)
    rng = np.random.default_rng(0)
    batches = {
        name: [per_token(examples(rng, (40, 25), vocab=100)) for _ in range(5)] for name in ADAMS
    }  # five batches in turn, so that the losses fall
    found: dict[str, list[float]] = {name: [] for name in ADAMS}
    for name, adam in ADAMS.items():
        trainer.add(name, family.adapter_dir / name, adam)
    for step in range(STEPS):
        outcomes = trainer.forward_backward({name: each[step % 5] for name, each in batches.items()})
        trainer.optim_step(ADAMS)
        if step == 0:
            compilations.clear()
        for name, losses in found.items():
            losses.append(outcomes[name].loss)
    assert compilations == []
    for name, adam in ADAMS.items():
        model = family.active(name)
        weights = list(lora_parameters(model, name).values())
        torch_adam = torch.optim.AdamW(weights, 1.0, (adam.b1, adam.b2), adam.eps, adam.weight_decay)
        expected = []
        for step in range(STEPS):
            loss = torch_loss(model, batches[name][step % 5])
            torch_adam.zero_grad()
            loss.backward()
            if adam.clip_norm:
                torch.nn.utils.clip_grad_norm_(weights, adam.clip_norm)
            torch_adam.param_groups[0]["lr"] = adam.rate(step)
            torch_adam.step()
            expected.append(float(loss.detach()))
        assert expected[-1] < expected[0] / 2  # it learns
        error = np.abs(np.array(found[name]) - expected).max()
        assert error < 1e-3, f"{name}: {error:.1e}"
